"""What a run shows while it runs: one line and one row of metrics.jsonl a step."""

import collections
import math
import time
from typing import Any

import jax
import numpy as np

from opsdc_jax.measures import is_repetitive
from opsdc_jax.metrics import MetricsFile
from opsdc_jax.rollout import Rollout

TIMES = ("tokens_per_s", "compilations")  # of a row: of this machine and process, not of the run


class Progress:
    """Live output and metrics.jsonl.

    A step's values are fetched while the next step's rollout runs, so the device never waits for
    the host. A step lasts from the end of the one before to its own end on the device.

    Args:
      metrics_file: None where another process writes it.
    """

    def __init__(self, metrics_file: MetricsFile | None, last_step: int):
        self._file = metrics_file
        self._last_step = last_step
        self._durations: collections.deque[float] = collections.deque(maxlen=8)
        self._pending: tuple[dict[str, Any], dict[str, Any]] | None = None
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves the time since the last step out of the next one's."""
        self._mark = time.perf_counter()

    def add(self, step: int, metrics: dict[str, Any], sampled: Rollout, compilations: int) -> None:
        """Keeps a step's metrics until `print_pending`."""
        row = {
            "step": step,
            "response_tokens": float(np.mean(sampled.lengths_B)),
            "truncated": float(1 - np.mean(sampled.stopped_B)),
            "repetition": repetition(sampled),
            "tokens_per_s": int(np.sum(sampled.lengths_B)),  # divided when the duration is known
            "compilations": compilations,
        }
        self._pending = row, metrics

    def print_pending(self) -> dict[str, Any] | None:
        """Waits for the step kept last, if any; writes, prints and returns its row."""
        if self._pending is None:
            return None
        row, metrics = self._pending
        self._pending = None
        row |= {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._durations.append(time.perf_counter() - self._mark)
        self.restart_clock()
        row["tokens_per_s"] /= self._durations[-1]
        if self._file:
            self._file.write(row)
        # The median of the newest steps: the compilations of the first ones do not come again.
        left = float(np.median(self._durations)) * (self._last_step - row["step"])
        print(
            f"step {row['step']:>4}/{self._last_step}  loss {row['loss']:.4f}  "
            f"tokens {row['response_tokens']:7.1f}  entropy {row['student_entropy']:.3f}  "
            f"{row['tokens_per_s']:8,.0f} tok/s  {seconds(left)} left"
            + ("  skipped: not finite" if row.get("skipped") else ""),
            flush=True,
        )
        return row


def repetition(sampled: Rollout) -> float:
    """Share of the rollouts that end in a loop."""
    rows = zip(sampled.tokens_BxR, sampled.lengths_B, sampled.stopped_B, strict=True)
    return float(np.mean([is_repetitive(ids[: length - stopped]) for ids, length, stopped in rows]))


def seconds(duration: float) -> str:
    """A duration as m:ss or h:mm:ss."""
    if not math.isfinite(duration):
        return "?"
    minutes, secs = divmod(round(duration), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"
