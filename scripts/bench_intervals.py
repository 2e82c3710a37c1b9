"""How often the 95% intervals of an evaluation cover the truth, in a world where it is known.

    python scripts/bench_intervals.py [--draws 2000] [--problems 500,30]

Draws evaluations of two systems on the same problems: lengths are log-normal over problems and over
the responses to each, solving is logistic-normal, and both are correlated between the systems. Each
is summarised by opsdc_jax/statistics.py as an evaluation of a real model is. Prints one JSON object
a line: a quantity, the number of problems, the method, how often its interval covered the truth,
and its mean width. "project" is what the project reports; beside it stand the percentile and the
BCa bootstrap over problems (scipy, 999 resamples) on the same draws.
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from scipy import special, stats

from opsdc_jax import cli, statistics
from opsdc_jax.statistics import HEADLINE, Graded

RESAMPLES = 999
Interval = tuple[float, float]


class World(NamedTuple):
    """Two systems, base and student, of which everything is known.

    Attributes:
      samples: responses to each problem.
      log_length: mean of the logarithm of the tokens, by system.
      spread, spread_within: standard deviation of that over problems; over responses to one.
      logit, logit_spread: mean and standard deviation over problems of the log-odds to solve one;
        the means by system.
      correlation: of both quantities between the systems.
    """

    samples: int = 4
    log_length: tuple[float, float] = (8.2, 7.4)
    spread: float = 1.0
    spread_within: float = 0.4
    logit: tuple[float, float] = (2.0, 1.7)
    logit_spread: float = 2.0
    correlation: float = 0.7

    def truth(self) -> dict[str, float]:
        """The true value of each quantity."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(99)
        base, student = (
            float(weights @ special.expit(mean + self.logit_spread * nodes))
            / math.sqrt(2 * math.pi)
            for mean in self.logit
        )
        return {
            "accuracy": student,
            "accuracy difference": student - base,
            "token reduction": 1 - math.exp(self.log_length[1] - self.log_length[0]),
        }

    def draw(self, problems: int, rng: np.random.Generator) -> tuple[Graded, Graded]:
        """One evaluation: the student and the base on the same problems."""
        first, second = rng.standard_normal((2, 2, problems, 1))
        shared = self.correlation * first + math.sqrt(1 - self.correlation**2) * second
        systems = []
        for side, (length, ability) in enumerate((first, shared)):
            shape = (problems, self.samples)
            noise = self.spread_within * rng.standard_normal(shape)
            tokens = np.exp(self.log_length[side] + self.spread * length + noise)
            solves = special.expit(self.logit[side] + self.logit_spread * ability)
            systems.append(_graded(rng.random(shape) < solves, tokens))
        return systems[1], systems[0]


def _graded(correct_PxK: np.ndarray, tokens_PxK: np.ndarray) -> Graded:
    zeros = np.zeros_like(tokens_PxK)
    counts = {"tokens": tokens_PxK, "thinking_tokens": tokens_PxK}
    return Graded(
        scores={HEADLINE: correct_PxK},
        counts=counts | {"answer_tokens": zeros, "doubt_words": zeros},
        flags=dict.fromkeys(("truncated", "repetitive", "unparsed", "timed_out"), zeros),
        levels=[""] * len(correct_PxK),
    )


def main(argv: Sequence[str]) -> int:
    """Simulates; prints the coverages."""
    values = flags.FlagValues()
    define = {"flag_values": values}
    flags.DEFINE_integer("draws", 2000, "evaluations drawn", 1, **define)
    flags.DEFINE_list("problems", ["500", "30"], "problems of an evaluation", **define)
    flags.DEFINE_integer("seed", 0, "of the simulation", 0, **define)
    flags.DEFINE_bool("bootstrap", True, "also the bootstraps, most of the time", **define)
    args = cli.parse(values, argv)
    for problems in map(int, args.problems):
        methods = ["project", "percentile", "BCa"] if args.bootstrap else ["project"]
        for row in coverage(World(), problems, args.draws, args.seed, methods):
            print(json.dumps({"benchmark": "intervals"} | row), flush=True)
    return cli.EXIT_DONE


def coverage(
    world: World, problems: int, draws: int, seed: int, methods: Sequence[str] = ("project",)
) -> list[dict[str, Any]]:
    """How often each method's interval of each quantity covers the truth, and its mean width."""
    drawing, resampling = (np.random.default_rng([seed, stream]) for stream in (0, 1))
    truth = world.truth()
    found: dict[tuple[str, str], list[Interval]] = {}
    for _ in range(draws):
        student, base = world.draw(problems, drawing)
        for method in methods:
            for quantity, interval in _intervals(method, student, base, resampling):
                found.setdefault((quantity, method), []).append(interval)
    rows = []
    for (quantity, method), intervals in sorted(found.items()):
        low, high = np.array(intervals).T
        covered = (low <= truth[quantity]) & (truth[quantity] <= high)
        rows.append(
            {
                "quantity": quantity,
                "problems": problems,
                "method": method,
                "coverage": round(float(covered.mean()), 4),
                "width": round(float((high - low).mean()), 4),
                "draws": draws,
            }
        )
    return rows


def _intervals(
    method: str, student: Graded, base: Graded, rng: np.random.Generator
) -> Iterator[tuple[str, Interval]]:
    if method == "project":
        compared = statistics.compare(student, base)
        for quantity, estimate in (
            ("accuracy", statistics.describe(student)["scores"][HEADLINE]),
            ("accuracy difference", compared["scores"][HEADLINE]),
            ("token reduction", compared["token_reduction"]["overall"]),
        ):
            yield quantity, (estimate["low"], estimate["high"])
        return
    for quantity, statistic, read in (
        ("accuracy difference", _difference, lambda side: side.correct),
        ("token reduction", _reduction, lambda side: side.counts["tokens"]),
    ):
        found = stats.bootstrap(
            [read(side).mean(axis=1) for side in (student, base)],
            statistic,
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            method=method,
            rng=rng,
        )
        yield quantity, tuple(found.confidence_interval)


def _difference(student: np.ndarray, base: np.ndarray, axis: int) -> np.ndarray:
    return student.mean(axis=axis) - base.mean(axis=axis)


def _reduction(student: np.ndarray, base: np.ndarray, axis: int) -> np.ndarray:
    return 1 - student.mean(axis=axis) / base.mean(axis=axis)


if __name__ == "__main__":
    sys.exit(cli.run(main))
