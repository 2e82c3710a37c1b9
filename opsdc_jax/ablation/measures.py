"""What is measured on a finished run, and over the seeds of a variant.

All shares and reductions are in percent, all differences of them in points.
"""

import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from opsdc_jax import intervals, results
from opsdc_jax.config import InputError
from opsdc_jax.files import read_json
from opsdc_jax.intervals import Estimate
from opsdc_jax.metrics import read_metrics
from opsdc_jax.results import BASE, CONCISE, STUDENT
from opsdc_jax.statistics import HEADLINE
from opsdc_jax.workdir import Workdir


class Label(NamedTuple):
    """What a measure is; of the student, where nothing else is said."""

    text: str
    unit: str


LABELS: Mapping[str, Label] = {
    "accuracy": Label("accuracy", "%"),
    "compression": Label("fewer tokens", "%"),
    "gain": Label("accuracy less the base's", " points"),
    "kept": Label("accuracy over the base's", "%"),
    "prompt_compression": Label("fewer tokens by the concise prompt alone", "%"),
    "prompt_gain": Label("accuracy less the concise prompt's", " points"),
    "entropy": Label("the student's entropy over that at the start", "%"),
    **{
        f"{measure}_{group}": Label(f"{text} on the {group} problems", "%")
        for measure, text in (("accuracy", "accuracy"), ("compression", "fewer tokens"))
        for group in ("easiest", "middle", "hardest")
    },
}
"""The measures that claims may be about."""

ENDS = 5  # steps of either end of a run over which the entropy is averaged

Measures = dict[str, float]
"""Of one run: those of `LABELS` that there are and are finite, and more: see `of_run`."""


def of_run(workdir: Workdir) -> Measures:
    """Measures of a finished run, `seconds` aside.

    Raises:
      InputError: a file is damaged, or the run was not evaluated on exactly one benchmark.
    """
    summary = read_json(workdir.summary)
    results.check_summary(workdir.summary, summary)
    if len(summary["benchmarks"]) != 1:
        raise InputError(f"{workdir.summary} must hold one benchmark: set eval.source to one")
    (benchmark,) = summary["benchmarks"].values()
    systems = benchmark["systems"]
    overall = {name: _figures(systems[name]["overall"]) for name in (BASE, CONCISE, STUDENT)}
    (accuracy, tokens), (base, before), (prompt, concise) = (
        overall[name] for name in (STUDENT, BASE, CONCISE)
    )
    measures = {
        "accuracy": accuracy,
        "tokens": tokens,
        "compression": 100 * (1 - tokens / before),
        "gain": accuracy - base,
        "kept": 100 * accuracy / base if base else math.nan,
        "prompt_accuracy": prompt,
        "prompt_compression": 100 * (1 - concise / before),
        "prompt_gain": accuracy - prompt,
        "base_accuracy": base,
        "base_tokens": before,
        "truncated": 100 * systems[STUDENT]["overall"]["truncated"]["value"],
        "entropy": _entropy(workdir.metrics),
    }
    levels = list(systems[STUDENT]["by_level"])
    for level in levels:
        right, length = _figures(systems[STUDENT]["by_level"][level])
        _, long = _figures(systems[BASE]["by_level"][level])
        measures[f"accuracy:{level}"] = right
        measures[f"compression:{level}"] = 100 * (1 - length / long)
    if len(levels) >= 3:
        ranks = {"easiest": 0, "middle": len(levels) // 2, "hardest": -1}
        for group, index in ranks.items():
            for measure in ("accuracy", "compression"):
                measures[f"{measure}_{group}"] = measures[f"{measure}:{levels[index]}"]
    return {name: value for name, value in measures.items() if math.isfinite(value)}


def _figures(statistics: Mapping[str, Any]) -> tuple[float, float]:
    """Accuracy in percent, and mean tokens of a response."""
    return 100 * statistics["scores"][HEADLINE]["value"], statistics["tokens"]["mean"]["value"]


def _entropy(path: pathlib.Path) -> float:
    """The student's entropy at the run's end over that at its start, in percent."""
    values = [row["student_entropy"] for row in read_metrics(path)]
    start = float(np.mean(values[:ENDS]))
    return 100 * float(np.mean(values[-ENDS:])) / start if start else math.nan


def over_seeds(runs: Sequence[Measures]) -> dict[str, Estimate]:
    """Mean and 95% t interval of every measure that all these runs have."""
    if not runs:
        return {}
    shared = [name for name in runs[0] if all(name in run for run in runs)]
    return {name: intervals.signed_mean(np.array([run[name] for run in runs])) for name in shared}


def levels(runs: Iterable[Measures]) -> list[str]:
    """The benchmark's levels of difficulty, easiest first."""
    return list(
        dict.fromkeys(
            name.partition(":")[2] for run in runs for name in run if name.startswith("accuracy:")
        )
    )
