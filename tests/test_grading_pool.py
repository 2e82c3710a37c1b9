"""Many gradings: the same results as one by one, and no input costs more than its limit."""

import os
import signal
import subprocess
import sys

import pytest
from grading_cases import DIFFERENT, SAME
from helpers import ROOT

from opsdc_jax import grading
from opsdc_jax.grading import pool

HANGING = "9^{9^{9^9}}"


def test_order_and_results_are_those_of_grade():
    pairs = [*SAME[::8], *DIFFERENT[::6]]
    items = [
        (f"<think>\\boxed{{1}}</think>Answer: {answer}", gold, False) for answer, gold in pairs
    ]
    items.append(("Answer: 2\\sqrt2", "\\sqrt8", True))
    grades = grading.grade_many(iter(items), workers=2)
    assert [grade.scores for grade in grades] == [grading.grade(*item) for item in items]
    assert not any(grade.timed_out for grade in grades)
    assert grading.grade_many([]) == []


def test_a_hanging_answer_costs_its_own_grade_only():
    items = [("Answer: 2\\sqrt2", "\\sqrt8", False) for _ in range(3)]
    items[1:1] = [(f"<think></think>Answer: {HANGING}", f"{n}\\sqrt2", False) for n in (5, 7)]
    items.append((f"Answer: {HANGING}\n\\boxed{{\\sqrt{{8}}}}", "2\\sqrt2", False))
    grades = grading.grade_many(items, workers=1, seconds=1.0)
    assert [grade.timed_out for grade in grades] == [False, True, True, False, False, True]
    assert [grade.scores["committed"] for grade in grades] == [True, False, False, True, True, True]
    assert not grades[1].scores["either"]
    assert grades[5].scores == {
        "answer_line": False,
        "boxed": True,
        "either": True,
        "committed": True,
    }


@pytest.mark.parametrize(
    "answer", ["10^{10^{10}}", "((((((((((" * 30 + "x", "\\sqrt{" * 140, "5!!!!!!"]
)
def test_no_answer_takes_the_worker_or_the_machine_down(answer):
    items = [(f"Answer: {answer}", "\\sqrt2", False), ("Answer: 2\\sqrt2", "\\sqrt8", False)]
    grades = grading.grade_many(items, workers=1, seconds=1.0)
    assert [grade.scores["committed"] for grade in grades] == [False, True]


def test_numbers_letters_and_words_start_no_process(monkeypatch):
    monkeypatch.setattr(pool, "_run", None)
    items = [
        ("Answer : 43", "43", False),
        ("Answer: (C)", "C", False),
        ("Answer: odd", "even", False),
    ]
    grades = grading.grade_many(items * 1000)
    assert [grade.scores["committed"] for grade in grades] == [True, True, False] * 1000


def test_a_worker_that_dies_counts_as_given_up(monkeypatch):
    class Dying(pool._Worker):
        def give(self, job):
            super().give(job)
            os.kill(self._process.pid, signal.SIGKILL)

    monkeypatch.setattr(pool, "_Worker", Dying)
    (grade,) = grading.grade_many([("Answer: 2\\sqrt2", "\\sqrt8", False)])
    assert grade.timed_out
    assert not grade.scores["committed"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_that_is_asked_to_stop_grades_on(monkeypatch, number):
    class Signalled(pool._Worker):
        def give(self, job):
            os.kill(self._process.pid, number)
            super().give(job)

    monkeypatch.setattr(pool, "_Worker", Signalled)
    (grade,) = grading.grade_many([("Answer: 2\\sqrt2", "\\sqrt8", False)])
    assert grade.scores["committed"]
    assert not grade.timed_out
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGTERM, signal.SIGINT}


def test_a_worker_that_cannot_start_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="could not be started"):
        grading.grade_many([("Answer: 2\\sqrt2", "\\sqrt8", False)])


def test_grading_leaves_signals_alone_and_workers_import_neither_jax_nor_main(tmp_path):
    script = tmp_path / "main.py"
    script.write_text(
        "import signal, sys, threading\n"
        "print('main')\n"  # without a guard: importing this file again would print it again
        "from opsdc_jax import grading\n"
        "def refuse(*args): raise AssertionError('a signal was touched')\n"
        "signal.signal = signal.alarm = signal.setitimer = refuse\n"
        "def work():\n"
        "    items = [('Answer: 2\\\\sqrt2', '\\\\sqrt8', False)]\n"
        "    print(grading.grade_many(items)[0].scores['committed'])\n"
        "    print(grading.grade(*items[0])['committed'])\n"
        "thread = threading.Thread(target=work); thread.start(); thread.join()\n"
        "print('jax' in sys.modules)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, script], env=env, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["main", "True", "True", "False"]
    modules = (
        "import sys\nsys.argv = ['worker', '1', str(2**33)]\n"
        "from opsdc_jax.grading import worker\nworker.main()\n"
        "assert 'jax' not in sys.modules and 'sympy' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", modules], env=env, input="", text=True, check=True)
