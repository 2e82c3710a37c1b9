"""Live output: one step late, each step written once."""

import numpy as np
import pytest

from opsdc_jax import progress
from opsdc_jax.metrics import MetricsFile, read_metrics
from opsdc_jax.progress import Progress
from opsdc_jax.rollout import Rollout

METRICS = {"loss": np.float32(0.5), "student_entropy": np.float32(0.25)}


def sampled(lengths, stopped):
    tokens = np.arange(2 * max(lengths)).reshape(2, -1)
    return Rollout(tokens, np.array(lengths), np.array(stopped), None)


def test_a_step_is_written_when_it_is_fetched_and_only_once(tmp_path, capsys, monkeypatch):
    clock = iter([10.0, 12.0, 12.0])  # made; the step fetched 2 s later; the next one begins
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    with MetricsFile(tmp_path / "m.jsonl", last_step=0) as file:
        shown = Progress(file, last_step=4)
        assert shown.print_pending() is None
        shown.add(1, METRICS, sampled([10, 30], [True, False]), compilations=3)
        assert read_metrics(tmp_path / "m.jsonl") == []
        row = shown.print_pending()
        assert shown.print_pending() is None
    assert [row] == read_metrics(tmp_path / "m.jsonl")
    assert read_metrics(tmp_path / "m.jsonl") == [
        {
            "step": 1,
            "response_tokens": 20.0,
            "truncated": 0.5,
            "repetition": 0.0,
            "tokens_per_s": 20.0,
            "compilations": 3,
            "loss": 0.5,
            "student_entropy": 0.25,
        }
    ]
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "step    1/4  loss 0.5000" in printed
    assert "0:06 left" in printed


def test_repetition_is_the_share_of_loops_without_the_stop_token():
    tokens = np.full((3, 64), 7)
    tokens[0], tokens[1, 50] = np.arange(64), 2
    rollout = Rollout(tokens, np.array([64, 51, 47]), np.array([False, True, False]), None)
    assert progress.repetition(rollout) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("duration", "expected"),
    [(0, "0:00"), (61.4, "1:01"), (3600, "1:00:00"), (float("nan"), "?"), (float("inf"), "?")],
)
def test_durations(duration, expected):
    assert progress.seconds(duration) == expected
