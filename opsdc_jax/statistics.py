"""Statistics of one system's graded responses, and of the difference between two systems.

The JSON objects that come out are described in docs/formats.md. Shapes: P problems, K responses to
each of them.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from opsdc_jax import intervals
from opsdc_jax.intervals import Estimate

HEADLINE = "committed"
"""The scorer that accuracy means, where nothing else is said."""

_LENGTHS = ("tokens", "thinking_tokens", "answer_tokens")
_FRACTIONS = ("truncated", "repetitive", "unparsed", "timed_out")
_COMPARED_FRACTIONS = ("truncated", "repetitive", "unparsed")
PASS_RATE_BINS = ("100%", "50-99%", "1-49%", "0%")
_TINY_LEVELS = ("easy", "medium", "hard")


@dataclasses.dataclass(frozen=True)
class Graded:
    """Measurements of all responses of one system: names of grades.jsonl -> [P, K] arrays.

    Attributes:
      scores: scorer -> whether the response is correct by it.
      counts: `tokens`, `thinking_tokens`, `answer_tokens`, `doubt_words`.
      flags: `truncated`, `repetitive`, `unparsed`, `timed_out`.
      levels: difficulty level of each problem, P texts.
    """

    scores: Mapping[str, np.ndarray]
    counts: Mapping[str, np.ndarray]
    flags: Mapping[str, np.ndarray]
    levels: Sequence[str]

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]], samples: int) -> "Graded":
        """From the rows of a complete grades.jsonl, ordered by problem and sample."""

        def grid(values: Iterable[Any]) -> np.ndarray:
            return np.array(list(values)).reshape(-1, samples)

        return cls(
            scores={name: grid(row["scores"][name] for row in rows) for name in rows[0]["scores"]},
            counts={name: grid(row[name] for row in rows) for name in (*_LENGTHS, "doubt_words")},
            flags={name: grid(row[name] for row in rows) for name in _FRACTIONS},
            levels=[row["level"] for row in rows[::samples]],
        )

    def select(self, problems: np.ndarray) -> "Graded":
        """The problems with these indices only."""
        scores, counts, flags = (
            {name: array[problems] for name, array in part.items()}
            for part in (self.scores, self.counts, self.flags)
        )
        return Graded(scores, counts, flags, [self.levels[index] for index in problems])

    @property
    def samples(self) -> int:
        return self.correct.shape[1]

    @property
    def correct(self) -> np.ndarray:
        """[P, K] by the headline scorer."""
        return self.scores[HEADLINE]


def by_level(graded: Graded) -> dict[str, np.ndarray]:
    """Level -> indices of its problems, easiest first; problems without a level are left out."""
    levels = sorted({level for level in graded.levels if level}, key=level_rank)
    return {level: np.flatnonzero(np.array(graded.levels) == level) for level in levels}


def level_rank(level: str) -> tuple[int, float, str]:
    """Sorts the tiny task's levels by difficulty, numbers by value, other names after them."""
    if level in _TINY_LEVELS:
        return _TINY_LEVELS.index(level), 0, ""
    number = float(level) if level.isdecimal() else float("inf")
    return len(_TINY_LEVELS), number, level


def by_pass_rate(base: Graded) -> dict[str, np.ndarray]:
    """Name in `PASS_RATE_BINS` -> indices of the problems that the base solves so often."""
    rate = base.correct.mean(axis=1)
    bins = (rate == 1, (rate >= 0.5) & (rate < 1), (rate > 0) & (rate < 0.5), rate == 0)
    named = {name: np.flatnonzero(held) for name, held in zip(PASS_RATE_BINS, bins, strict=True)}
    return {name: problems for name, problems in named.items() if len(problems)}


def pass_at(correct_PxK: np.ndarray, draws: int) -> np.ndarray:
    """Probability, for each problem, that at least one of `draws` responses is correct.

    Without bias: 1 - C(K - c, draws) / C(K, draws) for c correct ones of K (Chen et al. 2021,
    arXiv 2107.03374, equation 1).
    """
    samples = correct_PxK.shape[1]
    wrong = samples - correct_PxK.sum(axis=1)
    return 1 - special.comb(wrong, draws) / special.comb(samples, draws)


def describe(graded: Graded) -> dict[str, Any]:
    """STATISTICS of docs/formats.md."""
    return {
        "problems": len(graded.levels),
        "samples": graded.samples,
        "scores": {name: _fraction(array) for name, array in graded.scores.items()},
        "pass_at": {
            str(draws): intervals.proportion(pass_at(graded.correct, draws), graded.samples / draws)
            for draws in _draws(graded.samples)
        },
        **{name: _spread(graded.counts[name]) for name in _LENGTHS},
        **{name: _fraction(graded.flags[name]) for name in _FRACTIONS},
        "doubt_per_1000": intervals.ratio(*_doubts(graded)),
    }


def compare(graded: Graded, base: Graded) -> dict[str, Any]:
    """COMPARISON of docs/formats.md: `graded` against `base`, paired by problem."""
    reduction, both = _token_reduction(graded, base)
    return {
        "problems": len(base.levels),
        "scores": {
            name: _difference(graded.scores[name], base.scores[name]) for name in base.scores
        },
        "pass_at": {
            str(draws): intervals.difference_of_proportions(
                pass_at(graded.correct, draws),
                pass_at(base.correct, draws),
                base.samples / draws,
            )
            for draws in _draws(base.samples)
        },
        "token_reduction": reduction,
        "problems_both_solve": both,
        "thinking_reduction": _reduction("thinking_tokens", graded, base),
        "answer_reduction": _reduction("answer_tokens", graded, base),
        **{name: _difference(graded.flags[name], base.flags[name]) for name in _COMPARED_FRACTIONS},
        "doubt_per_1000": intervals.difference_of_ratios(*_doubts(graded), *_doubts(base)),
    }


def _draws(samples: int) -> list[int]:
    """The n of pass@n: powers of two, and all samples."""
    powers = [2**power for power in range(samples.bit_length())]
    return sorted({*powers, samples})


def _fraction(flags_PxK: np.ndarray) -> Estimate:
    return intervals.proportion(flags_PxK.mean(axis=1), flags_PxK.shape[1])


def _difference(flags_PxK: np.ndarray, others_PxK: np.ndarray) -> Estimate:
    return intervals.difference_of_proportions(
        flags_PxK.mean(axis=1), others_PxK.mean(axis=1), flags_PxK.shape[1]
    )


def _spread(counts_PxK: np.ndarray) -> dict[str, Any]:
    """Mean with its interval, median and 90th percentile over all responses."""
    return {
        "mean": intervals.mean(counts_PxK.mean(axis=1)),
        "median": float(np.median(counts_PxK)),
        "p90": float(np.quantile(counts_PxK, 0.9)),
    }


def _doubts(graded: Graded) -> tuple[np.ndarray, np.ndarray]:
    """Numerator and denominator, by problem, of words of doubt per 1,000 tokens."""
    words, tokens = graded.counts["doubt_words"], graded.counts["tokens"]
    return words.mean(axis=1), tokens.mean(axis=1) / 1000


def _reduction(name: str, graded: Graded, base: Graded) -> Estimate | None:
    """1 - ratio of the mean counts; None where the base has none."""
    before = base.counts[name].mean(axis=1)
    if not before.any():
        return None
    return intervals.reduction(intervals.ratio(graded.counts[name].mean(axis=1), before))


def _token_reduction(graded: Graded, base: Graded) -> tuple[dict[str, Estimate | None], int]:
    """The three token reductions, and on how many problems both have a correct response."""
    after, before = (side.counts["tokens"].mean(axis=1) for side in (graded, base))
    both = np.logical_and(graded.correct.any(axis=1), base.correct.any(axis=1))
    reductions: dict[str, Estimate | None] = {
        "overall": intervals.reduction(intervals.ratio(after, before)),
        "per_problem": intervals.reduction(intervals.mean(after / before)),
        "both_solve": None,
    }
    if both.any():
        solved = (_solved_tokens(side, both) for side in (graded, base))
        reductions["both_solve"] = intervals.reduction(intervals.ratio(*solved))
    return reductions, int(both.sum())


def _solved_tokens(graded: Graded, problems: np.ndarray) -> np.ndarray:
    """Mean tokens of the correct responses to each of these problems, which have at least one."""
    correct = graded.correct[problems]
    return (graded.counts["tokens"][problems] * correct).sum(axis=1) / correct.sum(axis=1)
