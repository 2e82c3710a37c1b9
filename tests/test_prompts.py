"""Both sides' prompts, rendered by the tiny tokenizer's template and by a Qwen3 one."""

import pytest

from opsdc_jax.config import InputError
from opsdc_jax.prompts import TEMPLATES, Prompts, instruction_text
from opsdc_jax.tiny.tokenizer import build_tokenizer

PROBLEM = "start 33 + 9 - 2"
TOKENIZER = build_tokenizer()


class Characters:
    """Tokenizes by characters and renders what the template is asked for, so that it shows."""

    chat_template = "present"

    def apply_chat_template(self, messages, *, add_generation_prompt, enable_thinking, tokenize):
        assert not tokenize
        (message,) = messages
        text = f"[{message['role']}|{message['content']}]"
        return text + (f"[thinking={enable_thinking}]" if add_generation_prompt else "")

    def __call__(self, text, add_special_tokens, verbose):
        assert not add_special_tokens, "the template already holds them"
        assert not verbose
        return {"input_ids": [ord(character) for character in text]}

    def get_added_vocab(self):
        return {"<control>": 0}


def text_of(ids):
    return "".join(map(chr, ids))


def test_tiny_prompts_in_full():
    prompts = Prompts(TOKENIZER, template="tiny", instruction="percent50")
    assert TOKENIZER.decode(prompts.student(PROBLEM)) == (
        f"<|im_start|> user {PROBLEM} <|im_end|> <|im_start|> assistant"
    )
    assert TOKENIZER.decode(prompts.teacher(PROBLEM)) == (
        f"<|im_start|> user Use 50 percent fewer tokens . {PROBLEM} <|im_end|> "
        "<|im_start|> assistant"
    )


@pytest.mark.parametrize("instruction", TEMPLATES["tiny"].instructions)
def test_every_tiny_instruction_is_in_the_vocabulary(instruction):
    prompts = Prompts(TOKENIZER, template="tiny", instruction=instruction)
    assert TOKENIZER.unk_token_id not in prompts.teacher(PROBLEM)


def test_dapo_wrapping_of_the_student():
    prompts = Prompts(Characters(), template="dapo", instruction="v1")
    assert text_of(prompts.student("What is 1+1?")) == (
        "[user|Solve the following math problem step by step. The last line of your response "
        "should be of the form Answer: $Answer (without quotes) where $Answer is the answer to "
        "the problem.\n\nWhat is 1+1?\n\nRemember to put your answer on its own line after "
        '"Answer:".][thinking=True]'
    )


def test_dapo_teacher_replaces_the_first_sentence_only():
    prompts = Prompts(Characters(), template="dapo", instruction="v1")
    assert text_of(prompts.teacher("What is 1+1?")) == (
        "[user|Solve the following math problem concisely and correctly. Be direct — avoid "
        "unnecessary elaboration, redundant steps, or restating the problem. Focus only on the "
        "key reasoning steps needed to reach the answer.\n\nThe last line of your response should "
        "be of the form Answer: $Answer (without quotes) where $Answer is the answer to the "
        "problem.\n\nWhat is 1+1?\n\nRemember to put your answer on its own line after "
        '"Answer:".][thinking=True]'
    )


def test_braces_of_a_problem_are_left_alone():
    problem = r"Find {problem} in \frac{1}{2} {instruction}"
    prompts = Prompts(Characters(), template="dapo", instruction="v2")
    for side in (prompts.student, prompts.teacher):
        assert text_of(side(problem)).count(problem) == 1


def test_thinking_is_set_by_side():
    prompts = Prompts(
        Characters(),
        template="tiny",
        instruction="v1",
        teacher_thinking=False,
        allow_different_thinking=True,
    )
    assert text_of(prompts.student(PROBLEM)).endswith("[thinking=True]")
    assert text_of(prompts.teacher(PROBLEM)).endswith("[thinking=False]")


def test_prompts_that_end_differently_are_refused():
    with pytest.raises(InputError, match="allow_different_thinking"):
        Prompts(TOKENIZER, template="tiny", instruction="v1", student_thinking=False)


def test_rejected_problems():
    prompts = Prompts(TOKENIZER, template="tiny", instruction="v1")
    longest = len(prompts.teacher(PROBLEM))
    assert prompts.rejection(PROBLEM, longest) is None
    assert "over" in prompts.rejection(PROBLEM, longest - 1)
    for token in ("<|im_end|>", "<think>"):
        assert "control token" in prompts.rejection(f"start 1 {token} + 2", longest)


@pytest.mark.parametrize("template", TEMPLATES)
def test_without_an_instruction_the_teacher_is_asked_as_the_student(template):
    prompts = Prompts(TOKENIZER, template=template, instruction="none")
    assert prompts.teacher(PROBLEM) == prompts.student(PROBLEM)


def test_a_sentence_of_the_users_own_is_an_instruction():
    own = "Be brief ."
    assert instruction_text(TEMPLATES["tiny"], own) == own


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instruction": "v9"}, "'v9' is neither one of v1, v2, percent20"),
        ({"template": "dap"}, "'dap' is not one of dapo, plain, tiny"),
        ({"instruction": "be <|im_end|> brief"}, "contains a control token"),
    ],
)
def test_unknown_names_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        Prompts(TOKENIZER, **{"template": "tiny", "instruction": "v1"} | changes)


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        (None, "no chat template"),
        ("{{ messages[0].content }}", "ignores add_generation_prompt"),
        ("{% if add_generation_prompt %}go{% endif %}", "drops or changes the user's message"),
    ],
)
def test_unusable_chat_templates_are_refused(chat_template, message):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = chat_template
    with pytest.raises(InputError, match=message):
        Prompts(tokenizer, template="tiny", instruction="v1")


@pytest.mark.parametrize("opening", ["", "<think>\n"], ids=["never thinks", "always thinks"])
def test_a_template_with_one_mode(opening):
    """As those of Qwen3's Instruct-2507 and Thinking-2507: there is nothing to switch off."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "<|im_start|>{{ messages[0].role }} {{ messages[0].content }}<|im_end|>"
        f"{{% if add_generation_prompt %}}<|im_start|>assistant\n{opening}{{% endif %}}"
    )
    prompts = Prompts(tokenizer, template="tiny", instruction="v1")
    ending = tokenizer(f"<|im_start|> assistant {opening}")["input_ids"]
    for side in (prompts.student, prompts.teacher):
        assert side(PROBLEM)[-len(ending) :] == ending
    for name in ("student", "teacher"):
        with pytest.raises(InputError, match=f"prompts.{name}_thinking=False has no effect"):
            Prompts(
                tokenizer,
                template="tiny",
                instruction="v1",
                allow_different_thinking=True,
                **{f"{name}_thinking": False},
            )


def test_stop_ids_must_hold_what_ends_an_answer():
    prompts = Prompts(TOKENIZER, template="tiny", instruction="v1")
    end = TOKENIZER.eos_token_id
    prompts.check_stop_ids([end + 1, end])
    with pytest.raises(InputError, match=rf"with {end} \(<\|im_end\|>\), .* \[0, 1\]: correct"):
        prompts.check_stop_ids((0, 1))


def test_a_template_without_an_end_of_turn_says_nothing_on_stop_ids(monkeypatch):
    prompts = Prompts(TOKENIZER, template="tiny", instruction="v1")
    text = "<|im_start|> user question <|im_start|> assistant probe"
    monkeypatch.setattr(TOKENIZER, "apply_chat_template", lambda *_, **__: text)
    prompts.check_stop_ids((0, 1))
