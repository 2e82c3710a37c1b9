"""The claims of the paper, and the rules by which runs decide on them, written before any result.

Every rule has the same form. A claim is one or more quantities, each measured once a seed: a
measure of a variant, or the difference of two, taken within the seed. Where the 95% interval over
the seeds lies

- wholly on the claim's side of its threshold, the claim is reproduced,
- wholly beyond the threshold of its contrary, the opposite is found,
- anywhere else, it is not reproduced.

A claim of several quantities is reproduced if all of them are, and the opposite if all are. One
seed gives no interval, and no verdict.

"Paper" is OPSDC (arXiv 2603.05433), whose Qwen3 models are four orders of magnitude larger than the
tiny one: a verdict is about the run that was made, not about the paper.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from opsdc_jax import intervals
from opsdc_jax.ablation.measures import Measures
from opsdc_jax.ablation.suites import DEFAULT
from opsdc_jax.intervals import Estimate

REPRODUCED, OPPOSITE, NOT_REPRODUCED = "reproduced", "opposite", "not reproduced"
NO_VERDICT = "no verdict"


class Quantity(NamedTuple):
    """A number of each seed, and where its interval must lie.

    Attributes:
      measure, variant: names in `measures.LABELS` and of the claim's suite.
      minus: (measure, variant) that is subtracted, within the seed.
      lower, upper: reproduced where the interval lies between them.
      below, above: opposite where it lies wholly below the one or above the other.
    """

    measure: str
    variant: str
    minus: tuple[str, str] | None
    lower: float
    upper: float
    below: float
    above: float


class Claim(NamedTuple):
    """What the paper says, where, and the quantities that decide.

    Attributes:
      suite: whose variants they are of.
      source: in the paper; or why the question is asked, where the paper gives no figure.
    """

    suite: str
    text: str
    source: str
    quantities: tuple[Quantity, ...]


def more(
    measure: str,
    variant: str,
    than: float = 0.0,
    minus: tuple[str, str] | None = None,
    contrary: float | None = None,
) -> Quantity:
    """A quantity that is claimed to be larger than a number."""
    below = than if contrary is None else contrary
    return Quantity(measure, variant, minus, than, math.inf, below, math.inf)


def less(measure: str, variant: str, than: float, contrary: float) -> Quantity:
    """A quantity that is claimed to be smaller than a number."""
    return Quantity(measure, variant, None, -math.inf, than, -math.inf, contrary)


def within(
    measure: str,
    variant: str,
    low: float,
    high: float,
    minus: tuple[str, str] | None = None,
) -> Quantity:
    """A quantity that is claimed to lie between two numbers."""
    return Quantity(measure, variant, minus, low, high, low, high)


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "method",
        "Responses lose at least half of their tokens while accuracy is held.",
        "main results: Qwen3-8B on MATH-500, 56.9% fewer tokens at 95.7% (base 95.7%)",
        (
            more("compression", DEFAULT, 50.0, contrary=0.0),
            more("gain", DEFAULT, -1.0),
        ),
    ),
    Claim(
        "method",
        "Easy problems compress more than medium ones, and these more than hard ones.",
        "main results: MATH-500 56.9%, AIME 2024 32.9%, AIME 2025 28.4% fewer tokens",
        (
            more("compression_easiest", DEFAULT, minus=("compression_middle", DEFAULT)),
            more("compression_middle", DEFAULT, minus=("compression_hardest", DEFAULT)),
        ),
    ),
    Claim(
        "method",
        "The student compresses more than the concise prompt does without training.",
        "main results: Qwen3-8B on MATH-500, 56.9% against 38.9% fewer tokens",
        (more("compression", DEFAULT, minus=("prompt_compression", DEFAULT)),),
    ),
    Claim(
        "method",
        "The student is no less accurate than the base under the concise prompt.",
        "main results: Qwen3-8B on MATH-500, 95.7% against 95.6%; on AIME it is lower",
        (more("prompt_gain", DEFAULT, -1.0),),
    ),
    Claim(
        "method",
        "The student's entropy stays in a band around its start.",
        "training dynamics: 0.33 to 0.29 nats",
        (within("entropy", DEFAULT, 65.0, 135.0),),
    ),
    Claim(
        "divergence",
        "Forward KL collapses.",
        "divergences: Qwen3-8B on MATH-500, 5.7% accurate at 29,135 tokens",
        (less("kept", "forward KL", 50.0, contrary=100.0),),
    ),
    Claim(
        "divergence",
        "JSD compresses about as much as reverse KL, and is less accurate.",
        "divergences: JSD 94.8% at 3,281 tokens, reverse KL 95.7% at 3,339",
        (
            within("compression", "JSD", -3.0, 3.0, minus=("compression", "reverse KL")),
            more("accuracy", "reverse KL", minus=("accuracy", "JSD")),
        ),
    ),
    Claim(
        "teacher",
        "A teacher that is refreshed at every step (M = 1) collapses.",
        "teacher interval: M = 1 falls to 60.8% on MATH-500 (base 95.7%), with more tokens; our "
        "threshold of half is stricter",
        (less("kept", "M = 1", 50.0, contrary=100.0),),
    ),
    Claim(
        "teacher",
        "A frozen teacher compresses less than one that is refreshed every M or M / 2 steps.",
        "teacher interval: frozen 18%, M = 50 32%, M = 30 52%, M = 10 64% fewer tokens",
        (
            more("compression", "M / 2", minus=("compression", "frozen")),
            more("compression", "M", minus=("compression", "frozen")),
        ),
    ),
    Claim(
        "teacher",
        "More refreshes compress more.",
        "teacher interval: the same figures; M / 5, the paper's M = 10, has no part in the rules, "
        "since 4 steps were seen to collapse on an earlier tiny base",
        (more("compression", "M / 2", minus=("compression", "M")),),
    ),
    Claim(
        "instruction",
        "The difficulty-aware instruction v2 compresses less than v1, and keeps more accuracy on "
        "hard problems.",
        "main results: Qwen3-8B, v2 17.1% fewer tokens on AIME 2024 at 75.0%, v1 32.9% at 72.9%",
        (
            more("compression", "v1", minus=("compression", "v2")),
            more("accuracy_hardest", "v2", minus=("accuracy_hardest", "v1")),
        ),
    ),
    Claim(
        "instruction",
        "An instruction that asks for a larger percentage compresses more.",
        "our own question: the paper prints these instructions, and we know of no figure",
        (
            more("compression", "percent50", minus=("compression", "percent20")),
            more("compression", "percent80", minus=("compression", "percent50")),
        ),
    ),
    Claim(
        "instruction",
        "Without an instruction nothing is compressed: the teacher's prompt is the student's.",
        "our own control: the method has no other source of brevity",
        (within("compression", "none", -5.0, 5.0),),
    ),
    Claim(
        "rollout",
        "Training on short rollouts, cut at 40% and at 30% of the budget, does as well.",
        "rollout length: 1k tokens in place of 8k, 29.8% fewer tokens at no loss of accuracy",
        tuple(
            within(measure, share, -3.0, 3.0, minus=(measure, "100%"))
            for share in ("40%", "30%")
            for measure in ("compression", "accuracy")
        ),
    ),
    Claim(
        "temperature",
        "The temperature of the rollouts hardly matters between 0.3 and 1.5.",
        "rollout temperature: nearly flat",
        tuple(
            within("compression", variant, -5.0, 5.0, minus=("compression", "T = 1.0"))
            for variant in ("T = 0.3", "T = 0.6", "T = 1.5")
        ),
    ),
)


class Judged(NamedTuple):
    """A quantity as it was measured.

    Attributes:
      estimate: over the seeds; None where a run or the measure is missing.
      verdict: one of the four; of `NO_VERDICT`, `reason` says why.
    """

    quantity: Quantity
    estimate: Estimate | None
    verdict: str
    reason: str = ""


Runs = Mapping[str, Mapping[int, Measures]]
"""Variant -> seed -> measures of the run."""


def judge(quantity: Quantity, runs: Runs, seeds: int) -> Judged:
    """One quantity, on the runs of so many seeds."""
    terms = [(1, quantity.measure, quantity.variant)]
    if quantity.minus:
        terms.append((-1, *quantity.minus))
    there = set.intersection(*(set(runs.get(variant, {})) for _, _, variant in terms))
    if len(there) < seeds:
        return Judged(quantity, None, NO_VERDICT, "runs are missing")
    try:
        values = [
            sum(sign * runs[variant][seed][measure] for sign, measure, variant in terms)
            for seed in sorted(there)
        ]
    except KeyError:
        return Judged(quantity, None, NO_VERDICT, "there is no such measure")
    estimate = intervals.signed_mean(np.array(values))
    low, high = estimate["low"], estimate["high"]
    if low is None or high is None:
        return Judged(quantity, estimate, NO_VERDICT, "one seed")
    if quantity.lower < low and high < quantity.upper:
        return Judged(quantity, estimate, REPRODUCED)
    if high < quantity.below or low > quantity.above:
        return Judged(quantity, estimate, OPPOSITE)
    return Judged(quantity, estimate, NOT_REPRODUCED)


def together(parts: list[Judged]) -> str:
    """The verdict of a claim from those of its quantities."""
    verdicts = {part.verdict for part in parts}
    if NO_VERDICT in verdicts:
        return NO_VERDICT
    return verdicts.pop() if len(verdicts) == 1 else NOT_REPRODUCED
