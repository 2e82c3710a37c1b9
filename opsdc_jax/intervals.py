"""Estimates with 95% intervals over problems: what is drawn at random is the problem.

Responses to one problem resemble each other, so the problem is the unit: functions take one number
a problem (but `signed_mean`, one a training run). All intervals are t intervals in closed form.
They cover the truth as often as the percentile bootstrap over problems does, and more often than
BCa; on accuracies of few problems more often than both: scripts/bench_intervals.py shows it, for
these very functions.

Shape: P problems.
"""

import math
from typing import TypedDict

import numpy as np
from scipy import special

_CONFIDENCE = 0.95


class Estimate(TypedDict):
    """A value and the ends of its 95% interval, None where there is none (a single problem)."""

    value: float
    low: float | None
    high: float | None


def ratio(numerator_P: np.ndarray, denominator_P: np.ndarray) -> Estimate:
    """Ratio of two means of non-negative numbers, pair by pair.

    The delta method on the logarithm, which a ratio of long-tailed lengths is closer to normal in:
    the relative error of problem i is y_i / mean(y) - x_i / mean(x). No interval at a ratio of 0.

    Raises:
      ValueError: the denominator's mean is 0.
    """
    y, x = np.asarray(numerator_P, float), np.asarray(denominator_P, float)
    if not x.mean() > 0:
        raise ValueError("the denominator of a ratio is 0")
    value = float(y.mean() / x.mean())
    if len(x) < 2 or value == 0:
        return Estimate(value=value, low=None, high=None)
    error = (y / y.mean() - x / x.mean()).std(ddof=1) / math.sqrt(len(x))
    factor = math.exp(_quantile(len(x)) * float(error))
    return Estimate(value=value, low=value / factor, high=value * factor)


def mean(values_P: np.ndarray) -> Estimate:
    """Mean of non-negative numbers."""
    return ratio(values_P, np.ones(len(values_P)))


def signed_mean(values_N: np.ndarray) -> Estimate:
    """Mean of numbers of either sign, for instance of one number a training run: plain t interval.

    Shape: N independent numbers, which need not be problems.
    """
    values = np.asarray(values_N, float)
    value = float(values.mean())
    if len(values) < 2:
        return Estimate(value=value, low=None, high=None)
    half = _quantile(len(values)) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Estimate(value=value, low=value - half, high=value + half)


def proportion(values_P: np.ndarray, responses: float) -> Estimate:
    """Mean of fractions in [0, 1].

    Wilson's interval for as many independent trials as would give the variance between problems.
    Where that variance is 0 a problem counts as one trial, so that 30 of 30 is not certainty.

    Args:
      responses: independent trials behind one problem's fraction, at least 1.
    """
    values = np.asarray(values_P, float)
    problems, value = len(values), float(values.mean())
    if problems < 2:
        return Estimate(value=value, low=None, high=None)
    variance = float(values.var(ddof=1)) / problems
    trials = float(problems)
    if variance > 0:
        trials = min(value * (1 - value) / variance, problems * responses)
    t2 = _quantile(problems) ** 2 / trials
    centre = (value + t2 / 2) / (1 + t2)
    half = math.sqrt(t2 * (value * (1 - value) + t2 / 4)) / (1 + t2)
    # Rounding must not push the value out of its own interval at 0 and 1.
    return Estimate(
        value=value,
        low=max(0.0, min(value, centre - half)),
        high=min(1.0, max(value, centre + half)),
    )


def difference_of_proportions(
    values_P: np.ndarray, others_P: np.ndarray, responses: float
) -> Estimate:
    """Difference of two means of fractions of the same problems, `values` - `others`.

    A t interval on the differences after adding 1 / `responses` problems that one side wins by 1
    and loses by 1, half each, and as many ties: Agresti and Min (2005) do so at one response, so
    that few or no disagreements do not pass for certainty.

    Args:
      responses: as in `proportion`.
    """
    differences = np.asarray(values_P, float) - np.asarray(others_P, float)
    problems, value = len(differences), float(differences.mean())
    if problems < 2:
        return Estimate(value=value, low=None, high=None)
    added = 1 / responses
    count = problems + 2 * added
    centre = float(differences.sum()) / count
    variance = (float((differences**2).sum()) + added) / count - centre**2
    half = _quantile(problems) * math.sqrt(variance / (count - 1))
    return Estimate(value=value, low=max(-1.0, centre - half), high=min(1.0, centre + half))


def difference_of_ratios(
    numerator_P: np.ndarray,
    denominator_P: np.ndarray,
    other_numerator_P: np.ndarray,
    other_denominator_P: np.ndarray,
) -> Estimate:
    """Difference of two ratios of means on the same problems, the first minus the other.

    The delta method: a t interval on what each problem moves the difference by.
    """
    y, x, v, u = (
        np.asarray(array, float)
        for array in (numerator_P, denominator_P, other_numerator_P, other_denominator_P)
    )
    first, other = y.mean() / x.mean(), v.mean() / u.mean()
    value = float(first - other)
    if len(x) < 2:
        return Estimate(value=value, low=None, high=None)
    moves = (y - first * x) / x.mean() - (v - other * u) / u.mean()
    half = _quantile(len(x)) * float(moves.std(ddof=1)) / math.sqrt(len(x))
    return Estimate(value=value, low=value - half, high=value + half)


def reduction(ratio_of: Estimate) -> Estimate:
    """1 - a ratio, with its interval."""
    low, high = ratio_of["low"], ratio_of["high"]
    return Estimate(
        value=1 - ratio_of["value"],
        low=None if high is None else 1 - high,
        high=None if low is None else 1 - low,
    )


def _quantile(problems: int) -> float:
    return float(special.stdtrit(problems - 1, (1 + _CONFIDENCE) / 2))
