"""From stored responses to summary.json: no model, no sampler."""

import json

import numpy as np
import pytest

from opsdc_jax import grading, results, summary
from opsdc_jax.config import InputError
from opsdc_jax.results import SystemFiles
from opsdc_jax.statistics import Graded

THINK, END, STOP = 1, 2, 3
SETTINGS = {
    "benchmark": "b",
    "source": "b.jsonl",
    "problems": 2,
    "fingerprint": "digest",
    "model": "model",
    "template": "dapo",
    "samples": 2,
    "max_response_tokens": 100,
    "temperature": 0.6,
    "top_p": 0.95,
    "top_k": 20,
    "seed": 0,
    "think_id": THINK,
    "end_think_id": END,
    "thought_open": False,
}


def write(folder, system, answers=("1", "1", "2", "5"), thought=5, **settings):
    """The files of a system that answers two problems, with gold 1 and 2, twice each."""
    files = SystemFiles(folder / "b", system)
    files.open(SETTINGS | {"system": system} | settings)
    files.append(
        {
            "index": number // 2,
            "sample": number % 2,
            "problem": f"p{number // 2}",
            "gold": str(number // 2 + 1),
            "level": "easy",
            "ids": [THINK, *range(10, 10 + thought), END, 7, 8, STOP],
            "text": f"<think> wait </think> Answer: {answer}" if answer else "<think> wait",
            "stopped": bool(answer),
            "prompt_tokens": 4,
        }
        for number, answer in enumerate(answers)
    )
    return files


def summarised(folder):
    for found in results.systems(folder / "b"):
        summary.grade(found)
    return summary.summarise(folder)["benchmarks"]["b"]


def test_grades_hold_all_measurements(tmp_path):
    files = write(tmp_path, "base", answers=("1", "", "2", "3"))
    summary.grade(files)
    first, cut, *_ = files.read_grades()
    assert first == {
        "index": 0,
        "sample": 0,
        "level": "easy",
        "tokens": 10,
        "thinking_tokens": 7,
        "answer_tokens": 3,
        "truncated": False,
        "repetitive": False,
        "doubt_words": 1,
        "unparsed": False,
        "scores": {"answer_line": True, "boxed": False, "either": True, "committed": True},
        "timed_out": False,
    }
    assert (cut["truncated"], cut["unparsed"], cut["scores"]["committed"]) == (True, False, False)
    assert "accuracy 50.0%, 10.0 tokens" in summary.headline(files)


def test_a_thought_that_the_prompt_opened_is_no_answer(tmp_path):
    files = SystemFiles(tmp_path / "b", "base")
    files.open(SETTINGS | {"thought_open": True})
    row = {"index": 0, "sample": 0, "problem": "", "gold": "1", "level": "", "ids": [7, 7, STOP]}
    files.append([row | {"text": "Answer: 1", "stopped": True, "prompt_tokens": 1}])
    summary.grade(files)
    (grade,) = files.read_grades()
    assert not grade["scores"]["committed"]
    assert grade["unparsed"]
    assert (grade["thinking_tokens"], grade["answer_tokens"]) == (3, 0)


def test_an_answer_that_hangs_the_grader_is_counted(tmp_path, monkeypatch):
    def grade_many(items):
        return [
            grading.Grade(grading.grade(*item), number == 1) for number, item in enumerate(items)
        ]

    monkeypatch.setattr(grading, "grade_many", grade_many)
    write(tmp_path, "base")
    found = summarised(tmp_path)
    assert found["systems"]["base"]["overall"]["timed_out"]["value"] == 0.25
    assert any("time limit" in warning for warning in found["warnings"])


def test_a_run_is_summarised_by_its_last_student(tmp_path):
    write(tmp_path, "base")
    write(tmp_path, "concise_prompt", thought=3)
    write(tmp_path, "student-000010", thought=4)
    write(tmp_path, "student-000020", thought=1, weights="step 20")
    found = summarised(tmp_path)
    assert list(found["systems"]) == ["base", "concise_prompt", "student"]
    assert found["systems"]["student"]["settings"]["weights"] == "step 20"
    assert found["settings"]["samples"] == 2
    assert "samples" not in found["systems"]["base"]["settings"]
    lengths = [
        (row["step"], row["statistics"]["tokens"]["mean"]["value"]) for row in found["curve"]
    ]
    assert lengths == [(0, 10), (10, 9), (20, 6)]
    assert [(c["system"], c["against"]) for c in found["comparisons"]] == [
        ("concise_prompt", "base"),
        ("student", "base"),
        ("student", "concise_prompt"),
    ]
    reduction = found["comparisons"][1]["overall"]["token_reduction"]["overall"]
    assert reduction["value"] == pytest.approx(0.4)
    assert list(found["systems"]["base"]["by_level"]) == ["easy"]
    assert list(found["systems"]["base"]["by_base_pass_rate"]) == ["100%", "50-99%"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_summary_is_empty_without_evaluation(tmp_path):
    assert summary.summarise(tmp_path) == {"benchmarks": {}}


def test_systems_that_were_sampled_differently_do_not_stand_side_by_side(tmp_path):
    write(tmp_path, "base")
    write(tmp_path, "student", max_response_tokens=50)
    with pytest.raises(InputError, match="max_response_tokens: 100 and 50"):
        summarised(tmp_path)


def test_an_incomplete_system_is_refused(tmp_path):
    write(tmp_path, "base", answers=("1", "1", "2"))
    with pytest.raises(InputError, match=r"holds 3 of 2 \* 2 responses"):
        summarised(tmp_path)


def test_a_damaged_line_is_named(tmp_path):
    files = write(tmp_path, "base")
    files.responses.write_text(files.responses.read_text() + "{\n")
    with pytest.raises(InputError, match=r"base.jsonl:5 does not hold a JSON object"):
        summary.grade(files)


def test_the_best_student_is_the_most_accurate_then_the_shortest_then_the_latest(tmp_path):
    def graded(step, *given, **how):
        summary.grade(write(tmp_path, results.student_name(step), *given, **how))
        return summary.best_student(tmp_path)

    summary.grade(write(tmp_path, results.BASE))
    assert summary.best_student(tmp_path) == 0, "the base is no student"
    assert graded(10) == 10
    assert graded(20, ("1", "1", "2", "2"), thought=9) == 20, "more accurate"
    assert graded(30, ("1", "1", "2", "2"), thought=20) == 20, "as accurate, longer"
    assert graded(40, ("1", "1", "2", "2"), thought=9) == 40, "the same, later"
    assert graded(50, ("1", "1", "5", "5"), thought=1) == 40, "shorter, less accurate"
    write(tmp_path, results.student_name(60), ("1", "1", "2", "2"), thought=1)
    assert summary.best_student(tmp_path) == 40, "not graded yet"


def test_students_after_the_restored_step_are_removed(tmp_path):
    for name in ("base", "student-000010", "student-000020"):
        write(tmp_path, name)
    results.remove_later_students(tmp_path, 10)
    left = [files.system for files in results.systems(tmp_path / "b")]
    assert left == ["base", "student-000010"]
    assert not list(tmp_path.rglob("*000020*"))


def graded(problems=200, samples=8, tokens=50, **flags):
    shape = (problems, samples)
    counts = dict.fromkeys(("tokens", "thinking_tokens"), np.full(shape, tokens))
    fractions = {name: np.zeros(shape) for name in ("truncated", "unparsed", "timed_out")}
    for name, share in flags.items():
        fractions[name].ravel()[: round(share * problems * samples)] = 1
    return Graded({"committed": np.ones(shape, bool)}, counts, fractions, [""] * problems)


@pytest.mark.parametrize(
    ("system", "words"),
    [
        (graded(), []),
        (graded(truncated=0.02), []),
        (graded(truncated=0.03), ["cut 3.0% of the responses"]),
        (graded(problems=30, samples=8), ["k = 8 on 30 problems is too little"]),
        (graded(problems=30, samples=32), []),
        (graded(tokens=100), ["90th percentile"]),
        (graded(unparsed=0.1), ["10.0% of the responses ended without an answer"]),
        (graded(timed_out=0.001), ["time limit"]),
    ],
)
def test_warnings_say_what_the_numbers_cannot_carry(system, words):
    found = summary.warnings({"base": system}, budget=100)
    assert len(found) == len(words)
    for warning, expected in zip(found, words, strict=True):
        assert expected in warning
