"""Rules, tables and verdicts as Markdown."""

import math
import re
from collections.abc import Mapping, Sequence

from opsdc_jax.ablation import measures
from opsdc_jax.ablation.measures import LABELS, Measures
from opsdc_jax.ablation.rules import CLAIMS, Claim, Judged, Quantity, Runs, judge, together
from opsdc_jax.ablation.suites import DEFAULT, Suite
from opsdc_jax.intervals import Estimate
from opsdc_jax.report.table import align


def rules() -> str:
    """All claims with their sources and rules, a table a suite."""
    parts = []
    for suite in dict.fromkeys(claim.suite for claim in CLAIMS):
        rows = [["claim", "source", "measured", "reproduced", "opposite"]]
        for claim in (claim for claim in CLAIMS if claim.suite == suite):
            for index, quantity in enumerate(claim.quantities):
                head = ["", ""] if index else [claim.text, claim.source]
                rows.append([*head, named(quantity), _inside(quantity), _beyond(quantity)])
        parts.append(f"Suite `{suite}`:\n\n{align(rows)}")
    return "\n\n".join(parts)


def named(quantity: Quantity) -> str:
    """What a quantity is, in words."""
    text = LABELS[quantity.measure].text
    if quantity.minus is None:
        return f"{text} ({quantity.variant})"
    measure, variant = quantity.minus
    if measure == quantity.measure:
        return f"{text} ({quantity.variant} less {variant})"
    return f"{text} less {LABELS[measure].text} ({variant})"


def unit(quantity: Quantity) -> str:
    """Of its numbers, with the space before it."""
    return LABELS[quantity.measure].unit if quantity.minus is None else " points"


def _inside(quantity: Quantity) -> str:
    low, high = quantity.lower, quantity.upper
    if math.isinf(high):
        return f"above {low:g}{unit(quantity)}"
    if math.isinf(low):
        return f"below {high:g}{unit(quantity)}"
    return f"between {low:g} and {high:g}{unit(quantity)}"


def _beyond(quantity: Quantity) -> str:
    sides = [f"below {quantity.below:g}"] if math.isfinite(quantity.below) else []
    sides += [f"above {quantity.above:g}"] if math.isfinite(quantity.above) else []
    return " or ".join(sides) + unit(quantity)


def table(suite: Suite, runs: Runs, overrides: Mapping[str, str]) -> str:
    """The variants side by side, after the base model; means with half of their 95% intervals.

    Args:
      overrides: variant -> the name of its runs, which says what it changes.
    """
    everything = [run for variant in suite.variants for run in runs[variant.name].values()]
    levels = measures.levels(everything)
    by_level = "/".join(levels)
    header = ["variant", "overrides", "accuracy %", "tokens", "fewer tokens %"]
    header += [f"accuracy {by_level}", f"fewer {by_level}"] if levels else []
    header += ["concise prompt alone: accuracy / fewer", "truncated %", "entropy %", "seconds"]
    rows = [header, _base_row(everything, len(header))]
    for variant in suite.variants:
        found = measures.over_seeds(list(runs[variant.name].values()))
        columns = [["accuracy"], ["tokens"], ["compression"]]
        if levels:
            columns += [[f"{m}:{level}" for level in levels] for m in ("accuracy", "compression")]
        columns += [["prompt_accuracy", "prompt_compression"], ["truncated"], ["entropy"]]
        cells = [
            " / ".join(_cell(found.get(name), half=len(names) == 1) for name in names)
            for names in [*columns, ["seconds"]]
        ]
        changed = overrides[variant.name]
        rows.append([variant.name, f"`{changed}`" if changed != DEFAULT else "", *cells])
    return align(rows)


def _base_row(runs: Sequence[Measures], width: int) -> list[str]:
    """The base model, whose responses are the same in all runs of a seed."""
    found = measures.over_seeds(runs)
    cells = [_cell(found.get(name), half=False) for name in ("base_accuracy", "base_tokens")]
    return ["base", "", *cells, *[""] * (width - 4)]


def _cell(estimate: Estimate | None, half: bool) -> str:
    if estimate is None:
        return "-"
    text = f"{estimate['value']:z.1f}"
    if half and estimate["low"] is not None and estimate["high"] is not None:
        text += f" ± {(estimate['high'] - estimate['low']) / 2:.1f}"
    return text


JudgedClaim = tuple[Claim, str, list[Judged]]
"""A claim, its verdict, and what that rests on."""


def judged(name: str, runs: Runs, seeds: int) -> list[JudgedClaim]:
    """The claims of a suite."""
    found = []
    for claim in (claim for claim in CLAIMS if claim.suite == name):
        parts = [judge(quantity, runs, seeds) for quantity in claim.quantities]
        found.append((claim, together(parts), parts))
    return found


def sentence(claim: Claim, verdict: str, parts: Sequence[Judged]) -> str:
    """A claim, its verdict and its figures, in a line."""
    figures = "; ".join(_figure(part) for part in parts)
    reason = next((part.reason for part in parts if part.reason), "")
    because = f" ({reason})" if reason else ""
    return f"- **{verdict}**{because}: {claim.text} {figures}."


def _figure(part: Judged) -> str:
    text = f"{named(part.quantity)}: "
    if part.estimate is None:
        return text + "not known"
    low, high = part.estimate["low"], part.estimate["high"]
    ends = "" if low is None or high is None else f" [{low:z.1f}, {high:z.1f}]"
    return f"{text}{part.estimate['value']:z.1f}{unit(part.quantity)}{ends}"


def replace_block(document: str, name: str, text: str) -> str:
    """A Markdown document with the text between the two comments that bear a name replaced.

    Raises:
      ValueError: the document has no such block.
    """
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    pattern = f"{re.escape(start)}.*?{re.escape(end)}"
    block = f"{start}{text}\n{end}"
    changed, count = re.subn(pattern, lambda _: block, document, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"the document holds {count} blocks {name!r}")
    return changed
