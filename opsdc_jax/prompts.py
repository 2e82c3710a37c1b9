"""Student and teacher prompts from one problem. The chat template is applied here only.

Student: pi(. | x), the plain prompt. Teacher: pi(. | c, x), the same problem under a conciseness
instruction c (OPSDC, arXiv 2603.05433, section "Method" and its prompt appendix). Both end in the
same generation prompt, so that the first response token means the same on both sides.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opsdc_jax.config import InputError

CONTROL_TOKEN = "the text contains a control token of the chat template"
"""Why a problem is left out: the model would read part of it as the end of the user's message."""
NO_INSTRUCTION = "none"
"""The name under which the teacher's prompt is the student's: to see what the instruction does."""
_PERCENTS = (20, 50, 80)
# No token of Qwen3 stands for more characters. A text beyond that many a token of the budget need
# not be tokenized, which takes minutes and gigabytes where a text has 100 MB.
_LONGEST_TOKEN = 128


@dataclass(frozen=True)
class Template:
    """User messages of the two sides; `{problem}` and `{instruction}` mark where text goes.

    `instructions` maps the names accepted by `config.prompts.instruction` to their text.
    """

    student: str
    teacher: str
    instructions: Mapping[str, str]


# The wrapping of DAPO-Math-17k and the instructions of the OPSDC paper are experimental constants:
# quoted exactly, since another wording is another experiment.
_DAPO_ANSWER_FORM = (
    "The last line of your response should be of the form Answer: $Answer (without quotes) "
    "where $Answer is the answer to the problem."
)
_DAPO_REMINDER = 'Remember to put your answer on its own line after "Answer:".'


def _paper_instructions(task: str) -> dict[str, str]:
    """The paper's instructions, which open with "Solve the following math problem"."""
    return {
        "v1": (
            f"{task} concisely and correctly. Be direct — avoid unnecessary elaboration, redundant "
            "steps, or restating the problem. Focus only on the key reasoning steps needed to "
            "reach the answer."
        ),
        "v2": (
            f"{task} concisely and correctly. Prioritize a correct final answer above brevity. For "
            "straightforward problems, be direct: avoid unnecessary elaboration, redundant steps, "
            "or restating the problem. For difficult or multi-step problems, do NOT over-compress: "
            "keep every reasoning step needed for correctness, including case analysis, edge "
            "cases, and a brief check of the final answer. Never omit a step that the answer "
            "depends on."
        ),
        **{
            f"percent{percent}": (
                f"{task} correctly using {percent}% fewer tokens than you normally would. Be more "
                "concise — cut unnecessary elaboration, redundant steps, and verbose explanations "
                "while preserving correctness."
            )
            for percent in _PERCENTS
        },
    }


_DAPO = Template(
    student=(
        "Solve the following math problem step by step. "
        f"{_DAPO_ANSWER_FORM}\n\n{{problem}}\n\n{_DAPO_REMINDER}"
    ),
    teacher=f"{{instruction}}\n\n{_DAPO_ANSWER_FORM}\n\n{{problem}}\n\n{_DAPO_REMINDER}",
    instructions=_paper_instructions("Solve the following math problem"),
)
# For other domains: the problem as it stands, under the same instructions without the word "math".
_PLAIN = Template(
    student="{problem}",
    teacher="{instruction}\n\n{problem}",
    instructions=_paper_instructions("Solve the following problem"),
)
# The same idea in the 200 words of the embedded task (opsdc_jax/tiny).
_TINY = Template(
    student="{problem}",
    teacher="{instruction} {problem}",
    instructions={
        "v1": "Be direct . Focus only on the key steps .",
        "v2": "Be direct on easy problems . Keep every needed step on hard problems .",
        **{f"percent{percent}": f"Use {percent} percent fewer tokens ." for percent in _PERCENTS},
    },
)
TEMPLATES: Mapping[str, Template] = {"dapo": _DAPO, "plain": _PLAIN, "tiny": _TINY}


def instruction_text(template: Template, instruction: str) -> str | None:
    """Text of an instruction: a known name, or the user's own wording (anything with a space).

    Returns:
      None for `NO_INSTRUCTION`.

    Raises:
      InputError: the name is unknown to this template.
    """
    if instruction == NO_INSTRUCTION:
        return None
    if instruction in template.instructions:
        return template.instructions[instruction]
    if " " not in instruction.strip():
        raise InputError(
            f"prompts.instruction={instruction!r} is neither one of "
            f"{', '.join(template.instructions)}, {NO_INSTRUCTION} nor a sentence of your own"
        )
    return instruction


class Prompts:
    """Renders problems to the token ids of the student's and of the teacher's prompt.

    Args:
      tokenizer: a transformers fast tokenizer with a chat template.
      template: a name in `TEMPLATES`.
      instruction: see `instruction_text`.
      student_thinking, teacher_thinking: `enable_thinking` of the chat template, by side.
      allow_different_thinking: accept prompts that end differently on the two sides.

    Raises:
      InputError: unknown template or instruction; a chat template without generation prompt, or
        without the thinking mode that is to be switched off; or sides that differ after the user's
        message, so that their first response tokens would not mean the same.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        template: str,
        instruction: str,
        student_thinking: bool = True,
        teacher_thinking: bool = True,
        allow_different_thinking: bool = False,
    ):
        if template not in TEMPLATES:
            raise InputError(f"prompts.template={template!r} is not one of {', '.join(TEMPLATES)}")
        if not getattr(tokenizer, "chat_template", None):
            raise InputError("the tokenizer has no chat template: use one of a chat model")
        self._tokenizer = tokenizer
        self._template = TEMPLATES[template]
        self._instruction = instruction_text(self._template, instruction)
        self._student_thinking = student_thinking
        self._teacher_thinking = teacher_thinking
        self._control_tokens = tuple(tokenizer.get_added_vocab())
        if self._instruction and self._has_control_token(self._instruction):
            raise InputError("prompts.instruction contains a control token of the chat template")
        self._check_endings(allow_different_thinking)

    def student(self, problem: str) -> list[int]:
        """Token ids of the plain prompt, ending in the generation prompt."""
        return self._encode(self._student_message(problem), self._student_thinking)

    def teacher(self, problem: str) -> list[int]:
        """Token ids of the prompt under the conciseness instruction, same ending."""
        return self._encode(self._teacher_message(problem), self._teacher_thinking)

    def check_stop_ids(self, stop_ids: Sequence[int]) -> None:
        """Refuses stop ids without the token that the chat template ends an answer with.

        A model made for that template ends its responses so, and no sampler would see it. A
        template that writes no control token there says nothing.

        Raises:
          InputError: naming both.
        """
        answer = "probe"
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}],
            tokenize=False,
        )
        ending = self._tokenizer(text.rpartition(answer)[2], add_special_tokens=False)["input_ids"]
        control_ids = set(self._tokenizer.get_added_vocab().values())
        end_of_turn = next((token for token in ending if token in control_ids), None)
        if end_of_turn is not None and end_of_turn not in stop_ids:
            raise InputError(
                f"the chat template ends an answer with {end_of_turn} "
                f"({self._tokenizer.convert_ids_to_tokens(end_of_turn)}), which is not among the "
                f"ids that end a response, {list(stop_ids)}: correct eos_token in "
                "tokenizer_config.json and eos_token_id in generation_config.json"
            )

    def rejection(self, problem: str, max_tokens: int) -> str | None:
        """Why a problem cannot be used, or None: prompts are dropped, never cut or cleaned."""
        if not problem.strip():
            return "the text is empty"
        if self._has_control_token(problem):
            return CONTROL_TOKEN
        if len(problem) > _LONGEST_TOKEN * max_tokens:
            return f"a prompt is over {max_tokens} tokens"
        longest = max(len(self.student(problem)), len(self.teacher(problem)))
        return f"a prompt is over {max_tokens} tokens" if longest > max_tokens else None

    def _has_control_token(self, text: str) -> bool:
        """Whether the tokenizer would read part of a text as a control token."""
        return any(token in text for token in self._control_tokens)

    def _student_message(self, problem: str) -> str:
        return self._template.student.replace("{problem}", problem)

    def _teacher_message(self, problem: str) -> str:
        if self._instruction is None:
            return self._student_message(problem)
        # The problem goes in last: its own braces must never be taken for a placeholder.
        message = self._template.teacher.replace("{instruction}", self._instruction)
        return message.replace("{problem}", problem)

    def _render(self, message: str, thinking: bool, generation_prompt: bool = True) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                [{"role": "user", "content": message}],
                add_generation_prompt=generation_prompt,
                enable_thinking=thinking,
                tokenize=False,
            )
        except Exception as error:  # whatever a template may do
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"the chat template cannot be rendered ({type(error).__name__}: {reason}): use the "
                "template of a chat model"
            ) from error

    def _encode(self, message: str, thinking: bool) -> list[int]:
        text = self._render(message, thinking)
        # verbose=False: whether a prompt is too long is for `rejection` to say.
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _check_endings(self, allow_different_thinking: bool) -> None:
        probe = "probe"
        endings = []
        for side, message, thinking in (
            ("student", self._student_message(probe), self._student_thinking),
            ("teacher", self._teacher_message(probe), self._teacher_thinking),
        ):
            text = self._render(message, thinking)
            if not thinking and text == self._render(message, thinking=True):
                raise InputError(
                    f"prompts.{side}_thinking=False has no effect: this model's chat template has "
                    "one mode only, so leave it at True"
                )
            if text == self._render(message, thinking, generation_prompt=False):
                raise InputError(
                    "the chat template ignores add_generation_prompt: use a chat model's template"
                )
            if message not in text:
                raise InputError("the chat template drops or changes the user's message")
            endings.append(text.rpartition(message)[2])
        if endings[0] != endings[1] and not allow_different_thinking:
            raise InputError(
                f"after the user's message the student's prompt goes on with {endings[0]!r}, the "
                f"teacher's with {endings[1]!r}: use the same thinking mode on both sides, or set "
                "prompts.allow_different_thinking"
            )
