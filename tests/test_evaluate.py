"""Sampling into files, with a sampler that answers by rule; and scripts/evaluate.py, killed."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from helpers import ROOT, load_script

from opsdc_jax import cli, evaluate, summary
from opsdc_jax.benchmarks import Benchmark
from opsdc_jax.config import InputError, default_config
from opsdc_jax.data import Example
from opsdc_jax.evaluate import Evaluator, System
from opsdc_jax.results import SystemFiles
from opsdc_jax.sampler import Response
from opsdc_jax.sampling import SamplingParams

STOP = 7


class Parrot:
    """Prompts, tokenizer and sampler in one: the response to [n] is "Answer: n", n tokens long.

    Prompts of 5 and more are cut by the budget. In a segment four responses end, the last first.
    """

    def __init__(self):
        self.prompts = []
        self.keys = []

    def responses(self, params, prompts, keys, sampling):
        self.prompts += [prompt[0] for prompt in prompts]
        self.keys += [tuple(key) for key in jax.random.key_data(keys).tolist()]
        for start in range(0, len(prompts), 4):
            yield []
            ended = range(start, min(start + 4, len(prompts)))
            yield [self.response(number, prompts[number][0]) for number in reversed(ended)]

    def response(self, number, length):
        tokens = np.array([length, *[STOP] * (length - 1)], np.int32)
        return Response(number, tokens, np.zeros(length, np.float32), length < 5)

    def decode(self, ids):
        assert len(ids) == ids[0] - (ids[0] < 5), "the stop token is no part of the text"
        return f"<think> </think> Answer: {ids[0]}"

    def get_vocab(self):
        return {"<think>": 100, "</think>": 101}

    def student(self, problem):
        return [int(problem)]

    teacher = student


def examples(numbers):
    return [Example(str(n), str(n), "odd" if n % 2 else "even") for n in numbers]


def sampled(numbers, samples=1, wanted=None):
    """The lists of rows that are written, one after the other; and the parrot."""
    parrot = Parrot()
    written = evaluate.responses(
        None,
        parrot,
        parrot,
        examples(numbers),
        [[number] for number in numbers],
        sampling=SamplingParams(),
        seed=0,
        samples=samples,
        numbers_N=wanted,
    )
    return list(written), parrot


def in_order(written):
    rows = [row for part in written for row in part]
    return sorted(rows, key=lambda row: (row["index"], row["sample"]))


def test_each_example_is_answered_once():
    numbers = [2, 3, 4, 2, 3, 4, 2, 3, 4, 6]
    written, _ = sampled(numbers)
    rows = in_order(written)
    assert [len(row["ids"]) for row in rows] == numbers
    assert [row["index"] for row in rows] == list(range(10))
    assert rows[0] == {
        "index": 0,
        "sample": 0,
        "problem": "2",
        "gold": "2",
        "level": "even",
        "ids": [2, STOP],
        "text": "<think> </think> Answer: 2",
        "stopped": True,
        "prompt_tokens": 1,
    }
    assert not rows[-1]["stopped"]
    assert len(rows[-1]["ids"]) == 6


def test_samples_of_a_problem_stand_side_by_side():
    written, parrot = sampled([2, 3], samples=3)
    assert parrot.prompts == [2, 2, 2, 3, 3, 3]
    rows = in_order(written)
    assert [(row["index"], row["sample"]) for row in rows] == [
        *((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2))
    ]
    assert len(set(parrot.keys)) == 6


def test_a_response_is_written_when_it_ends():
    written, _ = sampled([2, 3, 4, 2, 3])
    assert [[row["index"] for row in rows] for rows in written] == [[], [3, 2, 1, 0], [], [4]]


def test_keys_depend_on_the_problem_and_the_sample_alone():
    """Neither on where the sampling went on, nor on the number of samples."""
    numbers = [2, 3, 4, 2]
    keys = sampled(numbers, samples=2)[1].keys
    assert len(set(keys)) == 8
    wanted = np.array([1, 4, 5])
    assert sampled(numbers, samples=2, wanted=wanted)[1].keys == [keys[n] for n in wanted]
    assert sampled(numbers)[1].keys == keys[::2]


@pytest.fixture
def evaluator(tmp_path):
    """An evaluator of two benchmarks, whose sampler is a parrot."""
    settings = default_config()
    settings.eval.samples = 2
    parrot = Parrot()
    benchmarks = [
        Benchmark(name, name, examples(numbers), "digest", "")
        for name, numbers in (("small", [2, 3, 6]), ("one", [4]))
    ]
    return Evaluator(settings, benchmarks, parrot, parrot, parrot, tmp_path)


BASE = System("base", "model", "weights")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}


def test_a_system_leaves_settings_responses_and_grades(evaluator, capsys):
    assert not evaluator.open(BASE)
    evaluator.run(BASE, {})
    printed = capsys.readouterr().out
    assert "evaluated base on small: accuracy 66.7%, 3.7 tokens" in printed
    files = SystemFiles(evaluator.folder / "small", "base")
    settings = json.loads(files.settings.read_text())
    assert settings["system"] == "base"
    assert settings["instruction"] is None
    assert (settings["think_id"], settings["end_think_id"]) == (100, 101)
    assert settings["samples"] == 2
    assert len(list(files.rows())) == 6
    grades = files.read_grades()
    assert [grade["scores"]["committed"] for grade in grades] == [True] * 4 + [False] * 2
    assert [grade["truncated"] for grade in grades] == [False] * 4 + [True] * 2
    assert [grade["tokens"] for grade in grades] == [2, 2, 3, 3, 6, 6]


def test_nothing_is_sampled_or_graded_twice(evaluator):
    evaluator.run(BASE, {})
    sampled, before = len(evaluator.sampler.prompts), contents(evaluator.folder)
    assert evaluator.open(BASE)
    evaluator.run(BASE, None)
    assert len(evaluator.sampler.prompts) == sampled
    assert contents(evaluator.folder) == before


def test_asked_to_stop_it_ends_after_a_segment_and_goes_on_later(evaluator):
    answers = iter([False, True])
    assert not evaluator.run(BASE, {}, lambda: next(answers))
    files = SystemFiles(evaluator.folder / "small", "base")
    assert len(list(files.rows())) == 4
    assert not files.grades.exists()
    assert evaluator.run(BASE, {})
    stopped_once = contents(evaluator.folder)
    for path in evaluator.folder.rglob("*.*"):
        path.unlink()
    assert evaluator.run(BASE, {})
    assert contents(evaluator.folder) == stopped_once


@pytest.fixture
def another(evaluator, tmp_path):
    """An evaluator that takes over what the first one, a run of its own, has sampled."""
    folder = tmp_path / "first" / "eval"
    first = dataclasses.replace(evaluator, folder=folder, sampler=Parrot())
    settings = evaluator.settings.copy_and_resolve_references()
    settings.eval.reuse = str(folder.parent)
    return first, dataclasses.replace(evaluator, settings=settings, folder=tmp_path / "second")


def test_responses_of_another_run_are_taken_over(another):
    first, second = another
    first.run(BASE, {})
    second.run(BASE, None)
    assert second.sampler.prompts == []
    assert contents(second.folder) == contents(first.folder)


def test_what_another_run_has_not_sampled_yet_is_sampled(another):
    first, second = another
    first.run(BASE, {})
    expected = contents(first.folder)
    responses = SystemFiles(first.folder / "small", "base").responses
    responses.write_bytes(responses.read_bytes()[:-30])  # a run that still writes
    second.run(BASE, {})
    assert second.sampler.prompts == [6]
    assert contents(second.folder) == expected


def test_only_responses_sampled_in_the_same_way_are_taken_over(another):
    first, second = another
    student = System("student-000002", "model", "step 2")  # of another run, another student
    first.run(student, {})
    second.run(student, {})
    assert len(second.sampler.prompts) == 8
    first.settings.eval.temperature = 0.5
    first.run(BASE, {})
    second.run(BASE, {})
    assert len(second.sampler.prompts) == 16


def test_other_code_takes_nothing_over_but_goes_on_with_its_own(another, monkeypatch):
    first, second = another
    first.run(BASE, {})
    monkeypatch.setattr(evaluate, "_code", lambda: "changed")
    second.run(BASE, {})
    assert len(second.sampler.prompts) == 8
    assert first.open(BASE)


def test_every_cut_of_the_file_ends_in_the_same_bytes(evaluator):
    evaluator.run(BASE, {})
    expected = contents(evaluator.folder)
    files = SystemFiles(evaluator.folder / "small", "base")
    whole = files.responses.read_bytes()
    for end in range(0, len(whole), 97):
        files.responses.write_bytes(whole[:end])
        files.grades.unlink()
        evaluator.run(BASE, {})
        assert contents(evaluator.folder) == expected, f"cut at byte {end}"


def test_only_what_is_missing_is_sampled(evaluator):
    """Of lines in any order, whose last is not whole."""
    evaluator.run(BASE, {})
    expected = contents(evaluator.folder)
    files = SystemFiles(evaluator.folder / "small", "base")
    files.grades.unlink()
    lines = files.responses.read_bytes().splitlines(keepends=True)
    kept = [lines[number] for number in (4, 1, 2, 3)]
    files.responses.write_bytes(b"".join(kept) + lines[5][:-1])  # its line break is missing
    evaluator.sampler.prompts.clear()
    evaluator.run(BASE, {})
    assert evaluator.sampler.prompts == [2, 6]
    assert contents(evaluator.folder) == expected


def test_a_kill_before_the_file_was_ordered(evaluator):
    evaluator.run(BASE, {})
    expected = contents(evaluator.folder)
    files = SystemFiles(evaluator.folder / "small", "base")
    files.grades.unlink()
    lines = files.responses.read_bytes().splitlines(keepends=True)
    files.responses.write_bytes(b"".join(reversed(lines)))
    evaluator.run(BASE, None)
    assert contents(evaluator.folder) == expected


def test_an_incomplete_file_can_be_graded_and_goes_on(evaluator):
    """Its grades are ordered, and do not pass for those of all responses."""
    evaluator.run(BASE, {})
    expected = contents(evaluator.folder)
    files = SystemFiles(evaluator.folder / "small", "base")
    lines = files.responses.read_bytes().splitlines(keepends=True)
    files.responses.write_bytes(b"".join(lines[number] for number in (4, 1, 3)))
    summary.regrade(evaluator.folder)
    grades = files.read_grades()
    assert [(grade["index"], grade["sample"]) for grade in grades] == [(0, 1), (1, 1), (2, 0)]
    assert evaluator.run(BASE, {})
    assert contents(evaluator.folder) == expected


def test_a_damaged_response_is_named(evaluator):
    evaluator.run(BASE, {})
    files = SystemFiles(evaluator.folder / "small", "base")
    lines = files.responses.read_bytes().splitlines(keepends=True)
    files.responses.write_bytes(lines[0] + b"[]\n" + lines[2])
    with pytest.raises(InputError, match=r"base.jsonl:2 is damaged: delete this line"):
        evaluator.open(BASE)


@pytest.mark.parametrize(
    ("key", "value"),
    [("eval.max_response_tokens", 5), ("eval.temperature", 0.5), ("eval.samples", 3), ("seed", 9)],
)
def test_other_settings_are_not_mixed_in(evaluator, key, value):
    evaluator.run(BASE, {})
    other = evaluator.settings.copy_and_resolve_references()
    other.update_from_flattened_dict({key: value})
    with pytest.raises(InputError, match=rf"{key.split('.')[-1]}: .* -> {value}"):
        dataclasses.replace(evaluator, settings=other).open(BASE)


def test_another_model_or_other_problems_are_not_mixed_in(evaluator):
    evaluator.run(BASE, {})
    with pytest.raises(InputError, match="weights: 'weights' -> 'others'"):
        evaluator.open(BASE._replace(weights="others"))
    others = [evaluator.benchmarks[0]._replace(fingerprint="new")]
    with pytest.raises(InputError, match="fingerprint: 'digest' -> 'new'"):
        dataclasses.replace(evaluator, benchmarks=others).open(BASE)


def test_another_batch_size_may_go_on(evaluator):
    evaluator.run(BASE, {})
    other = evaluator.settings.copy_and_resolve_references()
    other.eval.batch_size = 1
    assert dataclasses.replace(evaluator, settings=other).open(BASE)


def test_responses_without_settings_are_refused(evaluator):
    evaluator.run(BASE, {})
    SystemFiles(evaluator.folder / "small", "base").settings.unlink()
    with pytest.raises(InputError, match=r"without base.settings.json"):
        evaluator.open(BASE)


script = load_script("evaluate")
TINY = [
    *("evaluate.py", "--model", "tiny", "--benchmark", "tiny", "--limit", "15", "--samples", "2"),
    *("--budget", "100", "--batch_size", "6", "--temperature", "1", "--top_p", "1", "--top_k", "0"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An evaluation with a "trained" model, which is the base again, that was never interrupted."""
    out = tmp_path_factory.mktemp("evaluation") / "out"
    assert cli.run(script.main, [*TINY, "--compare", "tiny", "--out", str(out)]) == cli.EXIT_DONE
    return out


def test_the_same_model_twice_differs_in_nothing(finished):
    (benchmark,) = json.loads((finished / "eval" / "summary.json").read_text())[
        "benchmarks"
    ].values()
    assert list(benchmark["systems"]) == ["base", "concise_prompt", "student"]
    base, concise, student = (system["overall"] for system in benchmark["systems"].values())
    assert base == student
    assert concise["tokens"]["mean"]["value"] < base["tokens"]["mean"]["value"]
    same = benchmark["comparisons"][1]
    assert (same["system"], same["against"]) == ("student", "base")
    assert same["overall"]["token_reduction"]["overall"]["value"] == 0
    assert benchmark["curve"] == []


def test_a_killed_evaluation_ends_as_if_it_had_never_been(finished, tmp_path):
    """Killed with SIGKILL, one system done, in the middle of the next."""
    out = tmp_path / "out"
    command = [*TINY, "--compare", "tiny", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / command[0]), *command[1:]],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    responses = out / "eval" / "tiny" / "concise_prompt.jsonl"
    while process.poll() is None and not responses.exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"
    assert len(responses.read_bytes().splitlines()) < 30
    assert not (out / "eval" / "summary.json").exists()
    assert cli.run(script.main, command) == cli.EXIT_DONE
    assert contents(out) == contents(finished)


def test_regrading_needs_no_model_and_changes_nothing(finished, monkeypatch, capsys):
    before = contents(finished)
    for grades in finished.rglob("*.grades.jsonl"):
        grades.write_text("")
    monkeypatch.setattr(script, "load", None)
    assert cli.run(script.main, ["evaluate.py", "--regrade", str(finished)]) == cli.EXIT_DONE
    assert contents(finished) == before
    assert "| base, concise prompt" in capsys.readouterr().out
    one = str(finished / "eval" / "tiny" / "base.jsonl")
    assert cli.run(script.main, ["evaluate.py", "--regrade", one]) == cli.EXIT_DONE
    assert contents(finished) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", ""], "--out is required"),
        (["--model", ""], "--model is required"),
        (["--model", "/nowhere"], "'/nowhere' is neither a folder nor a hub id"),
        (["--compare", "/nowhere"], "'/nowhere' is neither a folder nor a hub id"),
        (["--benchmark", "nothing"], "eval.source='nothing' is not known"),
        (["--benchmark", "none"], "leaves nothing to do"),
        (["--budget", "511"], "--budget=511 is too much"),
        (["--temperature", "0"], "would all be the same"),
        (["--top_p", "0"], "eval.top_p=0.0 must be above 0"),
        (["--instruction", "v9"], "prompts.instruction='v9'"),
        (["--template", "none"], "prompts.template='none'"),
        (["--regrade", "/nowhere"], "/nowhere"),
        (["--regrade", str(ROOT / "README.md")], "is no <system>.jsonl"),
        (["--regrade", str(ROOT / "docs")], "holds no responses"),
    ],
)
def test_bad_input_leaves_nothing_behind(arguments, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.run(script.main, [*TINY, "--out", str(out), *arguments]) == cli.EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_training_run_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert cli.run(script.main, [*TINY, "--out", str(tmp_path)]) == cli.EXIT_BAD_INPUT
    assert "is the folder of a training run" in capsys.readouterr().err
