"""Step -> examples is a pure function; evaluation never shares a problem with training."""

import collections
import json
import subprocess
import sys

import pytest
from helpers import ROOT

from opsdc_jax import data
from opsdc_jax.config import InputError
from opsdc_jax.data import Example, TableSource
from opsdc_jax.data.sources import levels
from opsdc_jax.prompts import TEMPLATES, Prompts
from opsdc_jax.tiny.tokenizer import build_tokenizer

TEN = [Example(f"p{index}", str(index), "") for index in range(10)]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows_of(examples):
    return [example._asdict() for example in examples]


def test_a_step_is_a_pure_function_of_seed_and_step():
    first, again = data.open_source("tiny", 3), data.open_source("tiny", 3)
    assert first.train(5, 8) == again.train(5, 8)
    assert first.train(5, 8) != first.train(6, 8)
    assert first.train(5, 8) != data.open_source("tiny", 4).train(5, 8)


def test_batches_tile_the_stream():
    source = data.open_source("tiny", 0)
    assert source.train(1, 8) == source.train(1, 4) + source.train(2, 4)


def test_evaluation_has_every_level_equally_and_no_training_problem():
    source = data.open_source("tiny", 0)
    examples = data.tiny_evaluation(0, 50)
    assert levels(examples) == ["easy", "medium", "hard"]
    for level in levels(examples):
        assert sum(example.level == level for example in examples) == 50
    trained = {example.problem for step in range(1, 41) for example in source.train(step, 32)}
    assert not trained & {example.problem for example in examples}


def test_evaluation_problems_differ_between_seeds():
    problems = [{example.problem for example in data.tiny_evaluation(seed, 50)} for seed in (0, 1)]
    assert len(problems[0] & problems[1]) < 15


def test_an_unknown_source_is_refused():
    with pytest.raises(InputError, match=r"data.source='tinny'"):
        data.open_source("tinny", 0)


def test_importing_the_package_imports_no_data_library():
    libraries = ("datasets", "pyarrow", "tensorflow_datasets", "jax", "transformers")
    code = f"import sys, opsdc_jax.data; print([m for m in {libraries} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_tiny_has_no_columns():
    with pytest.raises(InputError, match="leave the other data keys empty"):
        data.open_source("tiny", 0, split="train")


@pytest.mark.parametrize("batch_size", [1, 4, 10, 25])
def test_batches_tile_epochs_across_their_borders(batch_size):
    source = TableSource(TEN, seed=3)
    stream = [e for step in range(1, 101) for e in source.train(step, batch_size)]
    assert len(stream) == 100 * batch_size
    epochs = [stream[start : start + 10] for start in range(0, len(stream), 10)]
    assert all(sorted(epoch) == TEN for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)  # every epoch in its own order
    assert epochs[0] == TableSource(TEN, seed=3).train(1, 10)  # whatever the batch size


def test_a_step_of_a_table_is_a_pure_function_of_seed_and_step():
    source = TableSource(TEN, seed=3)
    later = source.train(7, 4)
    source.train(2, 4)
    assert source.train(7, 4) == later == TableSource(TEN, seed=3).train(7, 4)
    assert source.train(1, 10) != TableSource(TEN, seed=4).train(1, 10)


def test_the_order_never_changes_between_versions():
    """A run that is continued after an update must go on with the same problems."""
    order = [int(example.answer) for example in TableSource(TEN, seed=0).train(1, 20)]
    assert order == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9, 7, 6, 4, 5, 3, 9, 1, 0, 2, 8]


def test_open_source_reads_a_table(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"Q": "x", "A": {"b": 1}, "stars": 3}])
    names = {"problem_column": "Q", "answer_column": "A.b", "level_column": "stars"}
    source = data.open_source(path, 0, **names)
    assert source.train(1, 2) == [Example("x", "1", "3")] * 2


def test_the_report_accounts_for_every_row(tmp_path):
    rows = [
        {"problem": "a", "answer": 1},
        {"problem": "a", "answer": 1},
        {"problem": "a", "answer": 2},
        {"problem": "a"},
        {"problem": None},
        {"problem": "long"},
        {"problem": "long"},
        {"problem": "b"},
        *[{"problem": index} for index in range(6)],
    ]
    path = write_rows(tmp_path / "a.jsonl", rows)
    source = data.open_source(
        path, 0, accept=lambda example: "too long" if example.problem == "long" else None
    )
    assert sorted(source.train(1, 2)) == [("a", "1", ""), ("b", "", "")]
    first, *lines = source.report.splitlines()
    assert first.startswith(f"data.source='{path}': 2 of 14 rows kept, fingerprint ")
    assert lines == [
        "repeated problems: 4 rows, 1 with another answer; the first row counts",
        "dropped 1: too long",
        "bad rows: 7",
        f"  {path}:5: problem is null",
        *[f"  {path}:{9 + n}: problem is of type int, not a text" for n in range(4)],
        "  and 2 more",
    ]


def test_the_fingerprint_tells_data_apart(tmp_path):
    def fingerprint(name, rows):
        report = data.open_source(write_rows(tmp_path / name, rows), 0).report
        return report.splitlines()[0].rpartition(" ")[2]

    prints = [
        fingerprint("a.jsonl", rows_of(TEN)),
        fingerprint("b.jsonl", rows_of(TEN[::-1])),
        fingerprint("c.jsonl", rows_of(TEN[:9])),
        fingerprint("d.jsonl", rows_of([*TEN[:9], TEN[9]._replace(answer="x")])),
    ]
    assert len(set(prints)) == 4
    assert fingerprint("e.jsonl", [*rows_of(TEN), {"problem": ""}]) == prints[0]


def test_what_prompts_refuse_is_dropped_and_counted(tmp_path):
    tokenizer = build_tokenizer()
    prompts = Prompts(tokenizer, template="tiny", instruction="v1")
    limit = len(prompts.teacher("start 33 + 9"))
    problems = ["start 33 + 9", "start 33 + 9 - 2", "start <|im_end|> + 9", "start 1 + 2"]
    path = write_rows(tmp_path / "a.jsonl", [{"problem": problem} for problem in problems])

    def accept(example):
        return prompts.rejection(example.problem, limit)

    source = data.open_source(path, 0, accept=accept)
    assert {e.problem for e in source.train(1, 9)} == {"start 33 + 9", "start 1 + 2"}
    assert f"dropped 1: a prompt is over {limit} tokens" in source.report
    assert "dropped 1: the text contains a control token of the chat template" in source.report


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "a.jsonl' has no rows"),
        ([{"text": "x"}], {}, r"none of 1 rows .*a.jsonl:1: has no column .* only text\).*_column"),
        ([{"problem": "x"}], {"problem_column": "Q"}, "has no column Q, only problem"),
        ([{"problem": "x"}], {"accept": lambda _: "no"}, r"every problem was dropped \(1: no\)"),
        ([{"problem": "x"}], {"split": "train"}, "data.split='train' does not fit"),
    ],
)
def test_an_empty_result_is_an_error(tmp_path, rows, options, message):
    path = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(InputError, match=message):
        data.open_source(path, 0, **options)


def test_evaluation_needs_answers(tmp_path):
    rows = [{"problem": "a"}, {"problem": "a", "answer": 2}, {"problem": "b", "answer": " "}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    evaluation = data.evaluation_examples(path, 0)
    assert evaluation.examples == [Example("a", "2", "")]
    assert evaluation.report.startswith(f"eval.source='{path}': 1 of 3 rows kept")
    assert "a.jsonl:3: has no answer to grade with" in evaluation.report
    with pytest.raises(InputError, match=r"none of 3 rows .* in eval\.problem_column"):
        data.evaluation_examples(path, 0, problem_column="Q")


def test_a_limit_draws_problems_by_the_seed(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", rows_of(TEN))

    def drawn(seed, limit):
        evaluation = data.evaluation_examples(path, seed, limit=limit)
        assert (f"drawn from these: {limit}" in evaluation.report) == (0 < limit < 10)
        return evaluation.examples

    assert drawn(0, 0) == TEN
    assert drawn(0, 4) == drawn(0, 4) == drawn(0, 7)[:4]
    assert drawn(0, 7) != drawn(1, 7)
    assert drawn(0, 10) == drawn(0, 99) == TEN


@pytest.mark.parametrize(
    ("source", "given", "loaded"),
    [
        ("HuggingFaceH4/MATH-500", {}, [(None, "test", None)]),
        ("openai/gsm8k", {}, [("main", "test", None)]),
        ("openai/gsm8k@abc", {"split": "train", "subset": "s"}, [("s", "train", "abc")]),
        ("HuggingFaceH4/aime_2024", {}, [(None, "train", None)]),
        ("HuggingFaceH4/aime_2024@abc", {}, [(None, "train", "abc")]),
        ("yentinglin/aime_2025", {}, [(None, "train", None)]),
        (
            "opencompass/AIME2025",
            {},
            [("AIME2025-I", "test", None), ("AIME2025-II", "test", None)],
        ),
    ],
)
def test_published_benchmarks_need_no_more_than_their_name(monkeypatch, source, given, loaded):
    import datasets

    calls = []

    def load_dataset(path, name, *, split, revision):
        assert path == source.partition("@")[0]
        calls.append((name, split, revision))
        return datasets.Dataset.from_list([{"question": f"{name}?", "answer": "#### 7"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    examples = data.evaluation_examples(source, 0, **given).examples
    assert calls == loaded
    assert examples == [Example(f"{name}?", "7", "") for name, _, _ in loaded]


SHARED = ROOT.parent / "shared"


def shared(name):
    """A file beside the checkout, which the repository does not hold."""
    if not (SHARED / name).exists():
        pytest.skip(f"needs ../shared/{name} beside the checkout")
    return SHARED / name


@pytest.mark.parametrize(
    ("name", "count", "answered_by"),
    [
        ("math500.jsonl", 500, lambda row: row["answer"]),
        ("aime24.jsonl", 30, lambda row: row["answer"]),
        ("aime25.jsonl", 30, lambda row: str(row["answer"])),
        ("gsm8k_test.jsonl", 1319, lambda row: row["answer"].split("####")[1].strip()),
        ("gsm8k_train.jsonl", 7473, lambda row: row["answer"].split("####")[1].strip()),
        ("mmlu_stem_400.jsonl", 400, lambda row: "ABCD"[row["answer"]]),
    ],
)
def test_real_benchmarks(name, count, answered_by):
    path = shared(f"data/{name}")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    examples = data.evaluation_examples(str(path), 0).examples
    assert len(examples) == len(rows) == count
    for row, example in zip(rows, examples, strict=True):
        stated, *options = example.problem.rsplit("\n\nA. ", 1)
        assert stated == row.get("problem", row.get("question"))
        assert example.answer == answered_by(row)
        assert bool(options) == ("choices" in row)
        assert all(choice in example.problem for choice in row.get("choices", []))
        assert example.level == str(row.get("level", ""))
    if name == "math500.jsonl":
        assert collections.Counter(levels(examples)).keys() == set("12345")


def test_real_dapo_rows_are_unwrapped_and_wrapped_again_as_they_were():
    import pyarrow.parquet
    import transformers

    rows = pyarrow.parquet.read_table(shared("data/dapo_format_512.parquet")).to_pylist()
    stored = list(dict.fromkeys(row["prompt"][0]["content"] for row in rows))
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared("qwen3-tokenizer"))
    prompts = Prompts(tokenizer, template="dapo", instruction="v1")
    evaluation = data.evaluation_examples(
        str(shared("data/dapo_format_512.parquet")),
        0,
        accept=lambda example: prompts.rejection(example.problem, 1024),
    )
    assert "511 of 512 rows kept" in evaluation.report
    assert "repeated problems: 1 rows, 1 with another answer" in evaluation.report
    prefix, reminder = TEMPLATES["dapo"].student.split("{problem}")
    for example, text in zip(evaluation.examples, stored, strict=True):
        assert prefix.strip() not in example.problem
        assert reminder.strip() not in example.problem
        assert tokenizer.decode(prompts.student(example.problem)) == (
            f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        )
        assert tokenizer.decode(prompts.teacher(example.problem)).count(reminder.strip()) == 1
