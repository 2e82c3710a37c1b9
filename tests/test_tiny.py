"""The embedded world: task, tokenizer, pretraining, and the base model that ships."""

import dataclasses
import json
import re
import zlib

import jax
import numpy as np
import pytest
from helpers import SMALL, load_script

from opsdc_jax.config import InputError
from opsdc_jax.models import hf, qwen3, weights
from opsdc_jax.prompts import TEMPLATES, Prompts
from opsdc_jax.tiny import BASE_FOLDERS, pretrain, task
from opsdc_jax.tiny.tokenizer import build_tokenizer
from opsdc_jax.tiny.worlds import WORLDS, draw_style

INSTRUCTIONS = [None, *TEMPLATES["tiny"].instructions]
FACT = re.compile(r"(\d+((?: [-+*] \d+)+)) (?:=|is) (\d+)")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def evaluate_chain(chain: str) -> int:
    """Left to right, mod 100: by Python's own arithmetic on `((33 + 9) - 2) ...`."""
    words = chain.split()
    expression = "(" * (len(words) // 2) + words[0]
    for operator, operand in zip(words[1::2], words[2::2], strict=True):
        expression += f" {operator} {operand})"
    return eval(expression) % 100


def some_problems(split: str, count: int = 300, seed: int = 3) -> list[task.Problem]:
    return [task.make_problem(seed, index, split=split) for index in range(count)]


def some_responses(
    instruction: str | None, count: int = 200, world: str = "default"
) -> list[tuple[task.Problem, str]]:
    pairs = []
    for index, problem in enumerate(some_problems("pretrain", count)):
        rng = np.random.default_rng([7, index])
        style = draw_style(rng, instruction, problem.level, WORLDS[world])
        pairs.append((problem, task.write_response(problem, style, rng)))
    return pairs


def test_answer_is_the_value_of_the_text():
    for problem in some_problems("train"):
        prefix, chain = problem.text.split(" ", 1)
        assert prefix == "start"
        assert int(problem.answer) == evaluate_chain(chain)


def test_level_sets_the_number_of_operations():
    lengths = {"easy": {2}, "medium": {3, 4}, "hard": {5, 6}}
    for level, allowed in lengths.items():
        drawn = {
            len(task.make_problem(0, index, split="train", level=level).operations)
            for index in range(50)
        }
        assert drawn == allowed
    assert {problem.level for problem in some_problems("train")} == set(lengths)


def test_problems_are_a_function_of_seed_index_split():
    assert some_problems("eval") == some_problems("eval")
    assert some_problems("train") != some_problems("train", seed=4)
    assert some_problems("train") != some_problems("pretrain")


def test_unknown_split_and_level_are_refused():
    with pytest.raises(ValueError, match="test"):
        task.make_problem(0, 0, split="test")
    with pytest.raises(ValueError, match="brutal"):
        task.make_problem(0, 0, split="eval", level="brutal")


def test_evaluation_shares_no_problem_with_training():
    evaluation = {p.text for seed in (0, 1) for p in some_problems("eval", 500, seed)}
    trained = {
        p.text
        for seed in (0, 1)
        for split in ("train", "pretrain")
        for p in some_problems(split, 1500, seed)
    }
    assert not evaluation & trained


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_every_fact_and_answer_of_a_response_is_right(instruction):
    for problem, response in some_responses(instruction):
        thoughts, answer = response.split(" </think> ")
        assert answer == f"Answer : {problem.answer}"
        assert thoughts.startswith("<think> ")
        facts = FACT.findall(thoughts)
        assert facts
        for chain, _, value in facts:
            assert evaluate_chain(chain) == int(value)


def test_instructions_shorten_in_the_order_they_ask_for(tokenizer):
    length = {
        instruction: np.mean(
            [len(tokenizer.encode(text)) for _, text in some_responses(instruction, 600)]
        )
        for instruction in INSTRUCTIONS
    }
    order = [None, "percent20", "v2", "percent50", "percent80"]
    assert sorted(order, key=length.__getitem__, reverse=True) == order
    assert length["v1"] < 0.7 * length[None]


def test_verbosity_adds_tokens_and_merging_saves_them():
    problem = task.make_problem(0, 0, split="train", level="hard")

    def words(verbosity: float, merge: float) -> int:
        style = task.Style(verbosity, merge)
        text = task.write_response(problem, style, np.random.default_rng(0))
        return len(text.split())

    operations = len(problem.operations)
    assert words(0.0, 0.0) == 6 * operations + 5
    assert words(0.0, 1.0) < words(0.0, 0.0) < words(1.0, 0.0)


def test_default_world_stays_what_the_shipped_base_was_trained_on():
    texts = [text for name in INSTRUCTIONS for _, text in some_responses(name, 50)]
    assert zlib.crc32("\n".join(texts).encode()) == 3044774938


@pytest.mark.parametrize("level", task.LEVELS)
def test_modes_of_the_hard_world_hardly_overlap(level):
    def lengths(instruction: str | None) -> list[int]:
        pairs = some_responses(instruction, 600, "hard")
        return [len(text.split()) for problem, text in pairs if problem.level == level]

    assert np.quantile(lengths("v1"), 0.9) < np.quantile(lengths(None), 0.05)


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_checks_of_the_hard_world_go_on_until_two_derivations_agree(instruction):
    seen = set()
    for problem, response in some_responses(instruction, 400, "hard"):
        assert response.endswith(f" </think> Answer : {problem.answer}")
        verdicts = re.findall(r"So (\d+) , now (\d+) \. (Good|No) \.", response)
        for before, now, verdict in verdicts:
            assert (verdict == "Good") == (before == now)
        if verdicts:
            assert [verdict for *_, verdict in verdicts[:-1]] == ["No"] * (len(verdicts) - 1)
            assert verdicts[-1][1:] == (problem.answer, "Good")
        else:
            assert all(evaluate_chain(a) == int(v) for a, _, v in FACT.findall(response))
        seen.add(len(verdicts))
    assert {0, 1} <= seen
    assert instruction or max(seen) > 1


def test_tokenizer_knows_every_word_and_comes_back(tokenizer):
    texts = [
        text
        for world in WORLDS
        for name in INSTRUCTIONS
        for _, text in some_responses(name, world=world)
    ]
    texts += [problem.text for problem in some_problems("eval")]
    texts += list(TEMPLATES["tiny"].instructions.values())
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("serendipity") == [tokenizer.unk_token_id]


def test_numbers_are_one_token_each(tokenizer):
    numbers = [tokenizer.encode(str(number)) for number in range(100)]
    assert len({ids[0] for ids in numbers}) == 100
    assert {len(ids) for ids in numbers} == {1}


def test_chat_template_renders_like_qwen3(tokenizer):
    conversation = [
        {"role": "user", "content": "start 1 + 2"},
        {"role": "assistant", "content": "<think>\n1 + 2 = 3 .\n</think>\n\nAnswer : 3"},
        {"role": "user", "content": "start 33 + 9"},
    ]

    def render(messages, **options):
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    assert render(conversation, add_generation_prompt=True) == (
        "<|im_start|>user\nstart 1 + 2<|im_end|>\n"
        "<|im_start|>assistant\nAnswer : 3<|im_end|>\n"
        "<|im_start|>user\nstart 33 + 9<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert render(conversation[2:], add_generation_prompt=True, enable_thinking=False).endswith(
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert render(conversation[2:]) == "<|im_start|>user\nstart 33 + 9<|im_end|>\n"


def test_prompt_in_tokens(tokenizer):
    prompts = Prompts(tokenizer, template="tiny", instruction="percent50")
    assert tokenizer.decode(prompts.student("start 33 + 9")) == (
        "<|im_start|> user start 33 + 9 <|im_end|> <|im_start|> assistant"
    )
    assert tokenizer.decode(prompts.teacher("start 33 + 9")) == (
        "<|im_start|> user Use 50 percent fewer tokens . start 33 + 9 <|im_end|> "
        "<|im_start|> assistant"
    )


def test_corpus_is_a_function_of_seed_and_step(tokenizer):
    recipe = pretrain.Recipe()

    def step(seed: int, number: int):
        return list(pretrain.Corpus(tokenizer, seed, recipe).step(number))

    for ours, again in zip(step(0, 5), step(0, 5), strict=True):
        np.testing.assert_array_equal(ours.tokens_BxT, again.tokens_BxT)
        np.testing.assert_array_equal(ours.weights_BxT, again.weights_BxT)
    assert not np.array_equal(step(0, 5)[0].tokens_BxT, step(0, 6)[0].tokens_BxT)
    assert not np.array_equal(step(0, 5)[0].tokens_BxT, step(1, 5)[0].tokens_BxT)


def learned_words(tokenizer, rows: pretrain.Rows) -> list[str]:
    """The words with a weight, row by row."""
    return [
        tokenizer.decode(tokens[weights > 0])
        for tokens, weights in zip(rows.tokens_BxT, rows.weights_BxT, strict=True)
    ]


def test_only_responses_and_what_drills_determine_is_learned(tokenizer):
    recipe = pretrain.Recipe(documents=12, fact_rows=12, chain_rows=12, micro_batch=12)
    documents, facts, chains = step = list(pretrain.Corpus(tokenizer, 0, recipe).step(0))
    for text in learned_words(tokenizer, documents):
        assert text.startswith("<think>")
        assert text.endswith("<|im_end|>")
        assert text.count("<|im_") == 1
    for text in learned_words(tokenizer, facts):
        assert re.fullmatch(r"\d+( \d+)*", text)
        assert len(text.split()) == recipe.facts_in_row
    for text in learned_words(tokenizer, chains):
        steps, again = text.split(" : ")
        assert steps.endswith(again)
        assert all(evaluate_chain(a) == int(v) for a, _, v in FACT.findall(text))
    total = sum(float(rows.weights_BxT.sum()) for rows in step)
    assert total == pytest.approx(1 + 2 * recipe.drill_weight, rel=1e-5)


def test_drills_stop_where_the_recipe_says(tokenizer):
    recipe = pretrain.Recipe(documents=12, fact_steps=1, chain_steps=2, micro_batch=24)
    corpus = pretrain.Corpus(tokenizer, 0, recipe)
    assert [len(list(corpus.step(step))) for step in range(3)] == [3, 2, 1]


def test_what_stands_in_padding_changes_no_loss(tokenizer):
    config = dataclasses.replace(SMALL, vocab_size=len(tokenizer))
    params = qwen3.init_params(config, jax.random.key(0))
    recipe = pretrain.Recipe(documents=4, micro_batch=4, row_step=192)
    rows = next(pretrain.Corpus(tokenizer, 0, recipe).step(0))
    padding = rows.tokens_BxT == tokenizer.pad_token_id
    assert padding.any(axis=1).all()
    other = rows._replace(tokens_BxT=np.where(padding, 17, rows.tokens_BxT))
    loss = jax.jit(pretrain.rows_loss, static_argnums=1)
    assert float(loss(params, config, rows)) == float(loss(params, config, other))


def test_script_lowers_the_loss_and_writes_a_loadable_folder(tmp_path, monkeypatch, tokenizer):
    # One width, so one compilation.
    small = pretrain.Recipe(documents=6, fact_rows=6, chain_rows=6, micro_batch=6, row_step=192)
    monkeypatch.setattr(pretrain, "Recipe", lambda: small)
    script = load_script("pretrain_tiny")
    monkeypatch.setattr(script, "REPORT_EVERY", 1)
    folder = tmp_path / "base"
    code = script.main(
        ["pretrain_tiny.py", f"--out={folder}", "--steps_scale=0.0125", "--samples_per_level=1"]
    )
    assert code == 0
    record = json.loads((folder / "recipe.json").read_text())
    assert record["measured"].keys() == {name or "plain" for name in WORLDS["default"].mix}
    losses = list(record["loss"].values())
    assert losses[-1] < losses[0]
    config = hf.load_config(folder)
    params = weights.load_params(folder, config)
    assert params["embedding"].shape == (len(tokenizer), config.hidden_size)
    assert hf.load_tokenizer(folder).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(("flags", "reason"), [([], "--out"), (["--out=."], "exists")])
def test_script_refuses_a_folder_it_cannot_write(flags, reason):
    with pytest.raises(InputError, match=reason):
        load_script("pretrain_tiny").main(["pretrain_tiny.py", *flags])


@pytest.mark.parametrize("name", BASE_FOLDERS)
def test_shipped_base_fits_and_matches(tokenizer, name):
    folder = BASE_FOLDERS[name]
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 4 * 2**20
    config = hf.load_config(folder)
    assert config == pretrain.base_config(len(tokenizer))
    weights.load_params(folder, config)
    assert hf.stop_token_ids(folder, tokenizer) == (tokenizer.eos_token_id,)
    shipped = hf.load_tokenizer(folder)
    assert shipped.chat_template == tokenizer.chat_template
    assert shipped.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


@pytest.mark.parametrize(("name", "world"), [("tiny", "default"), ("tiny_hard", "hard")])
def test_shipped_recipe_is_the_recipe_of_the_code(name, world):
    record = json.loads((BASE_FOLDERS[name] / "recipe.json").read_text())
    assert record["mix"] == {
        prompt or "plain": share for prompt, share in WORLDS[world].mix.items()
    }
    assert record["recipe"] == dataclasses.asdict(pretrain.Recipe())
