"""Guards: what ends a run that has gone wrong, and what is said about settings that may.

A guard is a pure function of the rows of metrics.jsonl. A run that continues reads the rows back
and decides as if it had never stopped; every process has the same rows and decides alike.

What is watched, the limits and their margins over healthy runs: docs/reliability.md.
"""

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from opsdc_jax import manifest
from opsdc_jax.distill import TrainState
from opsdc_jax.results import BASE, SystemFiles, benchmark_folders

Row = Mapping[str, Any]

STOP = "stop"
WATCHED = {
    "response_tokens": ("responses get longer", "responses collapse"),
    "truncated": ("ever more responses are cut at the budget", ""),
    "repetition": ("responses end in loops", ""),
    "student_entropy": ("the student's entropy rises", "the student's entropy collapses"),
    "logprob_gap_mean": ("sampler and trainer disagree on log-probabilities", ""),
}
"""Key of metrics.jsonl -> what its trouble is called when it rises, and when it falls."""

_SHARES = ("truncated", "repetition")
_LOW_ENTROPY = 0.05  # nats a token: no rise up to here is trouble, whatever the start
_SMALL_M = 10  # steps between refreshes: the paper's smallest that kept its accuracy
_P90 = 0.1  # share of the base's responses that may be cut


class GuardError(RuntimeError):
    """A guard stops the run. The message says what went wrong and what to do."""


class Alarm(NamedTuple):
    """What a guard has seen at the newest row.

    Attributes:
      message: what is wrong, with numbers.
      good: the last step whose student was not yet in trouble.
    """

    message: str
    good: int


class Guard:
    """Watches a run's rows; stops the run, or warns once of each trouble that begins.

    Args:
      settings: the `guards` section of the run's configuration.
      rows: of the steps before, where the run continues.
      checkpoints: the run's folder of them.
      save: saves a state as that of a step.
    """

    def __init__(
        self,
        settings: ConfigDict,
        rows: Sequence[Row],
        checkpoints: pathlib.Path,
        save: Callable[[TrainState, int], None],
    ):
        self._settings = settings
        self._rows = list(rows)
        self._before = alarms(self._rows[:-1], settings)
        self._found = alarms(self._rows, settings)
        self._checkpoints = checkpoints
        self._save = save

    def add(self, row: Row | None, state: TrainState) -> None:
        """Takes the row of the next step, if there is one.

        A state in trouble is not saved: the newest checkpoint stays one that can be used, and the
        same command comes back to the same stop. After steps that were all skipped the state is
        still the one from before them, and saved.

        Args:
          state: after that step.

        Raises:
          GuardError: as `check`.
        """
        if row is None:
            return
        self._rows.append(row)
        self._before, self._found = self._found, alarms(self._rows, self._settings)
        stops = self._found and self._settings.action == STOP
        if stops and _good(self._found) == row["step"]:
            self._save(state, row["step"])
        self.check()

    def check(self) -> None:
        """Looks at the newest row.

        Raises:
          GuardError: there is trouble, and `guards.action` is "stop".
        """
        if self._found and self._settings.action == STOP:
            raise GuardError(self._advice())
        for name in self._found.keys() - self._before.keys():
            message = self._found[name].message
            print(f"warning: step {self._rows[-1]['step']}: {message}", flush=True)

    def _advice(self) -> str:
        """All alarms, the last good checkpoint, and what to do."""
        step = self._rows[-1]["step"]
        good = _good(self._found)
        if good < step:  # else it was saved just now, maybe still in the background
            good = newest_until(good, self._checkpoints)
        kept = (
            f"the last checkpoint from before is {self._checkpoints / str(good)}"
            if good
            else "no checkpoint from before is kept"
        )
        seen = "; ".join(alarm.message for alarm in self._found.values())
        return (
            f"step {step}: {seen}; {kept}; train "
            "anew, for instance with a smaller optim.lr or a larger teacher.every, or go on all "
            "the same with --config.guards.action=warn"
        )


def _good(found: Mapping[str, Alarm]) -> int:
    return min(alarm.good for alarm in found.values())


def alarms(rows: Sequence[Row], settings: ConfigDict) -> dict[str, Alarm]:
    """The troubles at the newest row, by name.

    Args:
      rows: of metrics.jsonl, from the first step to the newest. Values that are missing or not
        finite count for `nonfinite` only.
      settings: the `guards` section of the run's configuration.
    """
    skipped = nonfinite(rows, settings)
    found = {"nonfinite": skipped} if skipped else {}
    for key in WATCHED:
        alarm = drift(key, rows, settings)
        if alarm:
            found[key] = alarm
    return found


def nonfinite(rows: Sequence[Row], settings: ConfigDict) -> Alarm | None:
    """An alarm if the newest `settings.nonfinite_steps` steps were all skipped."""
    newest = rows[-settings.nonfinite_steps :]
    if len(newest) < settings.nonfinite_steps or not all(row.get("skipped") for row in newest):
        return None
    first, last = newest[0]["step"], newest[-1]["step"]
    return Alarm(
        f"loss or gradient was not finite in steps {first}-{last}, which changed nothing", last
    )


def drift(key: str, rows: Sequence[Row], settings: ConfigDict) -> Alarm | None:
    """An alarm if a value has left its band, see `bands`."""
    window = settings.window
    values = course(key, rows)
    if len(values) <= window:
        return None
    band = bands(key, [value for _, value in values], settings)
    if band.low <= band.now <= band.high:
        return None
    rises = band.now > band.high
    # Trouble may have begun before the newest steps: good is what lies before all those outside.
    inside = [step for step, value in values[:-window] if band.low <= value <= band.high]
    return Alarm(
        f"{WATCHED[key][0 if rises else 1]}: {key} is {band.now:.4g} (median of {window} steps), "
        f"{'over' if rises else 'under'} the limit of {band.high if rises else band.low:.4g}",
        # The rollouts of the last step inside are by the student after the step before.
        good=inside[-1] - 1 if inside else 0,
    )


def course(key: str, rows: Sequence[Row]) -> list[tuple[int, float]]:
    """(step, value) of a key, without steps that have no finite value of it."""
    return [(row["step"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]


class Band(NamedTuple):
    """Where a value is now, and the lowest and the highest that are no trouble."""

    now: float
    low: float
    high: float


def bands(key: str, values: Sequence[float], settings: ConfigDict) -> Band:
    """The newest steps' median of a value against what the run itself had before them.

    A fall is measured from the start: the mean of the first `settings.window` steps, or of as many
    as there are before the newest ones. Compression lowers lengths and entropy, so a rise is
    measured from lower: from the mean so far, or the start where that is lower; of entropy, whose
    rise is the first sign of a collapse and whose noise is small, from the lowest median so far.

    Args:
      key: of metrics.jsonl.
      values: of all steps so far, more than `settings.window`.
    """
    window = settings.window
    medians = np.median(np.lib.stride_tricks.sliding_window_view(values, window), axis=-1)
    before = values[:-window]
    start = float(np.mean(before[:window]))
    usual = min(start, float(np.mean(before)))
    now, low, high = float(medians[-1]), -math.inf, settings.rise * usual
    if key in _SHARES:
        high = usual + settings.share_rise
    elif key == "logprob_gap_mean":
        high = max(settings.gap, high)
    elif key == "student_entropy":
        lowest = min([start, *medians[:-window].tolist()])
        low, high = settings.fall * start, max(_LOW_ENTROPY, settings.rise * lowest)
    else:
        low = settings.fall * start
    return Band(now, low, high)


def newest_until(step: int, checkpoints: pathlib.Path) -> int:
    """The newest checkpoint of a step up to `step`; 0 if there is none."""
    return max((found for found in manifest.steps(checkpoints) if found <= step), default=0)


def risky_settings(settings: ConfigDict) -> list[str]:
    """What to tell about settings that are known to fail, one sentence each.

    Args:
      settings: the whole configuration.
    """
    found = []
    every = settings.teacher.every / (1 - settings.teacher.decay)  # until it is mostly the student
    if 0 < every < _SMALL_M:
        found.append(
            f"teacher.every={settings.teacher.every}: with a teacher refreshed this often the "
            f"student collapses; use {_SMALL_M} steps or more"
        )
    if settings.loss.divergence == "forward_kl":
        found.append(
            "loss.divergence='forward_kl': in the paper the student collapsed under it (accuracy "
            "5.7% after 99 steps of Qwen3-8B); use 'reverse_kl'"
        )
    return found


def short_budgets(evaluations: pathlib.Path, budget: int) -> list[str]:
    """Benchmarks whose budget is under the 90th percentile of the base's lengths, a sentence each.

    Cut responses hide their true length: that percentile is over the budget where more than a tenth
    is cut.

    Args:
      evaluations: eval/ of a run, in which the base is graded.
      budget: eval.max_response_tokens.
    """
    found = []
    for folder in benchmark_folders(evaluations):
        rows = SystemFiles(folder, BASE).read_grades()
        cut = sum(row["truncated"] for row in rows) / len(rows)
        if cut > _P90:
            found.append(
                f"eval.max_response_tokens={budget} cuts {100 * cut:.0f}% of the base's responses "
                f"on {folder.name}: lengths and accuracy are not the model's own; raise it until "
                f"under {100 * _P90:.0f}% are cut"
            )
    return found
