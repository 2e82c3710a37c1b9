"""The figures of a run, each a chart of its own."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from opsdc_jax.report.run import Responses, Run
from opsdc_jax.report.svg import Chart
from opsdc_jax.report.text import RULES, SYSTEMS, interval, loss, percent, value
from opsdc_jax.statistics import HEADLINE, level_rank

_BINS = 32
_LONGEST_NAME = 40  # of a level, in the name of a file
_LEVELS = 8  # more levels than that share one chart of lengths


class Figure(NamedTuple):
    """A chart, the name of its file in plots/, and what a reader should know."""

    name: str
    chart: Chart
    caption: str = ""


def evaluation(benchmark: str, results: Mapping[str, Any]) -> list[Figure]:
    """Accuracy against tokens, and where a run was evaluated on its way, either over the steps."""
    found = [_tradeoff(benchmark, results)]
    if len(results["curve"]) > 1:
        found.append(_over_steps("tokens", benchmark, results, _tokens, 1))
        found.append(_over_steps("accuracy", benchmark, results, _accuracy, 100))
    return found


def _accuracy(statistics: Mapping[str, Any]) -> Mapping[str, Any]:
    return statistics["scores"][HEADLINE]


def _tokens(statistics: Mapping[str, Any]) -> Mapping[str, Any]:
    return statistics["tokens"]["mean"]


def _over_steps(
    name: str,
    benchmark: str,
    results: Mapping[str, Any],
    measure: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    scale: float,
) -> Figure:
    curve = [(point["step"], measure(point["statistics"])) for point in results["curve"]]
    concise = results["systems"].get("concise_prompt")
    level = measure(concise["overall"]) if concise else None
    estimates = [estimate for _, estimate in curve] + ([level] if level else [])
    low, high = _padded([_interval(estimate, scale) for estimate in estimates], 0.0)
    # Of tokens the ratio counts, so their axis begins at zero; of accuracies the difference.
    title, start = ("Response tokens", 0.0) if name == "tokens" else ("Accuracy (%)", low)
    chart = Chart(f"{title} over training", "step", x=(0, curve[-1][0]), y=(start, high))
    chart.legend("student", "student")
    if level:
        chart.legend("concise_prompt", SYSTEMS["concise_prompt"])
        chart.level("concise_prompt", scale * level["value"])
    chart.line("student", [(step, scale * estimate["value"]) for step, estimate in curve])
    for step, estimate in curve:
        role, who = ("student", f"after step {step}") if step else ("base", "base")
        note = f"{who}: {value(estimate, scale)} ({interval(estimate, scale)})"
        y = scale * estimate["value"]
        chart.point(role, step, y, note, y_interval=_interval(estimate, scale))
    caption = "On the evaluation problems, with 95% intervals; step 0 is the base model."
    return Figure(f"{name}-steps-{benchmark}", chart, caption)


def _tradeoff(benchmark: str, results: Mapping[str, Any]) -> Figure:
    """Accuracy against tokens: base, concise prompt, and the student over its steps."""
    curve = [(point["step"], point["statistics"]) for point in results["curve"]]
    systems = {name: system["overall"] for name, system in results["systems"].items()}
    shown = [*systems.values(), *(statistics for _, statistics in curve)]
    spans_x = [_interval(_tokens(s)) for s in shown]
    spans_y = [_interval(_accuracy(s), 100) for s in shown]
    chart = Chart(
        "Accuracy (%) against response tokens",
        "mean response tokens",
        x=_padded(spans_x, 0.12, low=0.0),
        y=_padded(spans_y, 0.0, low=0.0, high=100.0),
    )
    for name in systems:
        chart.legend(name, SYSTEMS[name].removeprefix("base, "))
    path = [(_tokens(s)["value"], 100 * _accuracy(s)["value"]) for _, s in curve]
    chart.line("student", path)
    for step, statistics in curve[1:-1]:
        _system_point(chart, "student minor", f"student after step {step}", statistics)
    for name, statistics in systems.items():
        _system_point(chart, name, SYSTEMS[name], statistics)
    caption = f"{benchmark}: up and to the left is better. Whiskers are 95% intervals."
    if curve:
        chart.label("student", *path[-1], f"step {curve[-1][0]}")
        caption += " The line follows the student from step to step."
    return Figure(f"accuracy-tokens-{benchmark}", chart, caption)


def _system_point(chart: Chart, role: str, name: str, statistics: Mapping[str, Any]) -> None:
    tokens, accuracy = _tokens(statistics), _accuracy(statistics)
    chart.point(
        role,
        tokens["value"],
        100 * accuracy["value"],
        f"{name}: {percent(accuracy['value'])} at {tokens['value']:,.1f} tokens",
        x_interval=_interval(tokens),
        y_interval=_interval(accuracy, 100),
    )


def _interval(estimate: Mapping[str, Any], scale: float = 1.0) -> tuple[float, float]:
    """Ends of an estimate's interval; of one that has none, the value itself."""
    ends = (estimate["low"], estimate["high"])
    low, high = (estimate["value"] if end is None else end for end in ends)
    return scale * low, scale * high


def _padded(
    spans: Sequence[tuple[float, float]],
    share: float,
    low: float = -math.inf,
    high: float = math.inf,
) -> tuple[float, float]:
    """The range of all spans and a little more, inside [low, high]."""
    start, end = min(span[0] for span in spans), max(span[1] for span in spans)
    room = share * (end - start)
    return max(low, start - room), min(high, end + room)


class _Curves(NamedTuple):
    """A chart over the steps; `lines` are (key of metrics.jsonl, role, name)."""

    name: str
    title: str
    lines: tuple[tuple[str, str, str], ...]
    caption: str
    scale: float = 1.0


_CURVES = (
    _Curves(
        "loss",
        "Loss (nats a token)",
        (("loss", "student", "loss"),),
        "{loss}. It jumps where a refreshed teacher is further away.",
    ),
    _Curves(
        "length",
        "Rollout tokens",
        (("response_tokens", "student", "rollouts"),),
        "Mean over the rollouts of a step, each cut at the budget of training.",
    ),
    _Curves(
        "entropy",
        "Entropy (nats a token)",
        (("student_entropy", "student", "student"), ("teacher_entropy", "teacher", "teacher")),
        "In a collapse the student's leaves its band.",
    ),
    _Curves(
        "truncated",
        "Truncated rollouts (%)",
        (("truncated", "student", "truncated"),),
        "Rollouts that the budget of training cut.",
        scale=100,
    ),
    _Curves(
        "logprob-gap",
        "Log-probability gap (nats)",
        (("logprob_gap_max", "teacher", "largest"), ("logprob_gap_mean", "student", "mean")),
        "Between sampler and trainer, of the sampled tokens: rounding only, if all is well.",
    ),
    _Curves(
        "gradient",
        "Gradient norm",
        (("grad_norm", "student", "norm"),),
        "Of the whole gradient, before clipping.",
    ),
)


def training(run: Run) -> list[Figure]:
    """Loss, length, entropies, truncation, log-probability gap and gradient over the steps."""
    return [_over_training(run, curves) for curves in _CURVES] if run.metrics else []


def _over_training(run: Run, curves: _Curves) -> Figure:
    steps = [row["step"] for row in run.metrics]
    lines = [
        (role, label, [curves.scale * row.get(key, math.nan) for row in run.metrics])
        for key, role, label in curves.lines
    ]
    finite = [value for _, _, line in lines for value in line if math.isfinite(value)]
    low, high = min([0.0, *finite]), max([0.0, *finite])
    chart = Chart(curves.title, "step", x=(0, steps[-1]), y=(low, high))
    for role, label, line in lines:
        if len(lines) > 1:
            chart.legend(role, label)
        chart.line(role, list(zip(steps, line, strict=True)))
        if len(steps) == 1 and finite:
            chart.point(role, steps[0], line[0], label)
    if len(run.refreshes) <= RULES:
        chart.rules(run.refreshes)
    return Figure(curves.name, chart, curves.caption.format(loss=loss(run.config)))


def lengths(responses: Responses) -> list[Figure]:
    """How long the responses are before and after, a chart for each difficulty."""
    base, student = responses.base.read_grades(), responses.student.read_grades()
    levels = sorted({row["level"] for row in base}, key=level_rank)
    if len(levels) > _LEVELS:
        levels, base, student = [""], _without_levels(base), _without_levels(student)
    end = max(row["tokens"] for row in (*base, *student))
    edges = np.linspace(0, end, min(_BINS, end) + 1)
    charts = []
    for level in levels:
        shares = {
            role: _shares([row["tokens"] for row in rows if row["level"] == level], edges)
            for role, rows in (("base", base), ("student", student))
        }
        highest = max(float(share.max()) for share in shares.values())
        title = f"{level or 'All problems'}: responses (%)"
        chart = Chart(title, "response tokens", x=(0, float(end)), y=(0, highest))
        for role, share in shares.items():
            chart.legend(role, role)
            outline = [
                (float(x), float(y))
                for left, right, y in zip(edges, edges[1:], share, strict=False)
                for x in (left, right)
            ]
            chart.area(role, outline)
            chart.line(role, outline)
        plain = "".join(letter if letter.isalnum() else "-" for letter in level)
        name = plain[:_LONGEST_NAME] or "all"
        charts.append(Figure(f"lengths-{responses.benchmark}-{name}", chart))
    return charts


def _without_levels(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "level": ""} for row in rows]


def _shares(tokens: Sequence[int], edges: np.ndarray) -> np.ndarray:
    counts, _ = np.histogram(tokens, edges)
    return 100 * counts / max(len(tokens), 1)
