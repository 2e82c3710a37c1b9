"""The final tables of a run, as text."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from opsdc_jax.intervals import Estimate
from opsdc_jax.statistics import HEADLINE

SYSTEM_NAMES = {
    "base": "base, plain prompt",
    "concise_prompt": "base, concise prompt",
    "student": "student, plain prompt",
}


def tables(summary: Mapping[str, Any]) -> str:
    """All that a run prints at its end: for each benchmark its table, claims and warnings.

    Args:
      summary: contents of summary.json (docs/formats.md).
    """
    benchmarks = summary["benchmarks"]
    if not benchmarks:
        return "no evaluation (eval.source is none)"
    parts = []
    for name, benchmark in benchmarks.items():
        parts += [name] if len(benchmarks) > 1 else []
        parts += [table(benchmark), verdict(benchmark)]
        parts += [f"warning: {warning}" for warning in benchmark["warnings"]]
    return "\n\n".join(filter(None, parts))


def table(benchmark: Mapping[str, Any]) -> str:
    """The systems side by side: accuracy % / mean response tokens, with 95% half-widths."""
    systems = benchmark["systems"]
    levels = list(next(iter(systems.values()))["by_level"])
    reductions = {
        comparison["system"]: comparison["overall"]["token_reduction"]["overall"]
        for comparison in benchmark["comparisons"]
        if comparison["against"] == "base"
    }
    rows = [["accuracy % / tokens", *levels, "all (95%)", "length (95%)"]]
    for name, system in systems.items():
        groups = [system["by_level"][level] for level in levels]
        overall = system["overall"]
        rows.append(
            [
                SYSTEM_NAMES[name],
                *(f"{_percent(_accuracy(group))} / {_tokens(group):.1f}" for group in groups),
                f"{_with_half(_accuracy(overall), 100)} / "
                f"{_with_half(overall['tokens']['mean'], 1)}",
                f"{_with_half(reductions[name], -100, '+')}%" if name in reductions else "",
            ]
        )
    return align(rows)


def _accuracy(statistics: Mapping[str, Any]) -> Estimate:
    return statistics["scores"][HEADLINE]


def _tokens(statistics: Mapping[str, Any]) -> float:
    return statistics["tokens"]["mean"]["value"]


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate['value']:.1f}"


def _half(estimate: Estimate) -> float:
    """Half the width of an interval; 0 where there is none."""
    low, high = estimate["low"], estimate["high"]
    return 0.0 if low is None or high is None else (high - low) / 2


def _with_half(estimate: Estimate, scale: float, sign: str = "") -> str:
    """A scaled value and half the width of its interval."""
    return f"{scale * estimate['value']:{sign}.1f} ± {abs(scale) * _half(estimate):.1f}"


class Claim(NamedTuple):
    """A claim of the paper, measured on a run: its words, whether it held, and the figures."""

    name: str
    text: str
    held: bool
    figures: str


def claims(benchmark: Mapping[str, Any]) -> list[Claim]:
    """What the paper claims of OPSDC, checked on a benchmark of summary.json.

    Nothing where the student and the base do not stand there side by side. Accuracy is held if the
    interval of its difference reaches 0.
    """
    pairs = {(c["system"], c["against"]): c for c in benchmark["comparisons"]}
    if ("student", "base") not in pairs:
        return []
    comparison = pairs["student", "base"]
    reduction = comparison["overall"]["token_reduction"]["overall"]
    gain = _accuracy(comparison["overall"])
    found = [
        Claim(
            "compression",
            "at least 50% fewer tokens",
            reduction["value"] >= 0.5,
            f"{_with_half(reduction, -100, '+')}%",
        ),
        Claim(
            "accuracy_held",
            "accuracy not below the base's",
            gain["high"] is None or gain["high"] >= 0,
            f"{_with_half(gain, 100, '+')} points",
        ),
    ]
    changes = {
        level: -group["token_reduction"]["overall"]["value"]
        for level, group in comparison["by_level"].items()
    }
    if len(changes) > 1:
        easiest, hardest = next(iter(changes)), list(changes)[-1]
        figures = ", ".join(f"{level} {100 * value:+.0f}%" for level, value in changes.items())
        held = changes[easiest] < changes[hardest]
        text = "easy problems compress more than hard ones"
        found.append(Claim("easy_first", text, held, figures))
    return found


def verdict(benchmark: Mapping[str, Any]) -> str:
    """The claims of the paper as lines of text: reproduced on this run, or not."""
    found = claims(benchmark)
    if not found:
        return ""
    rows = [["claim of the paper", "on this run", "measured"]]
    for claim in found:
        rows.append([claim.text, "holds" if claim.held else "DOES NOT HOLD", claim.figures])
    return align(rows)


def align(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with columns of equal width."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
