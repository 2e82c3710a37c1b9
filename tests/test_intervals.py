"""Intervals: closed forms against references, edges, and how often they cover the truth."""

import math

import numpy as np
import pytest
from helpers import load_script
from scipy import stats

from opsdc_jax import intervals

RNG = np.random.default_rng(0)
LENGTHS = np.exp(RNG.normal(7, 1, (40, 2)))


def ends(estimate):
    return estimate["low"], estimate["high"]


def test_a_ratio_is_the_ratio_of_means_and_swaps_with_its_inverse():
    ratio = intervals.ratio(LENGTHS[:, 0], LENGTHS[:, 1])
    inverse = intervals.ratio(LENGTHS[:, 1], LENGTHS[:, 0])
    assert ratio["value"] == pytest.approx(LENGTHS[:, 0].mean() / LENGTHS[:, 1].mean())
    assert ratio["low"] < ratio["value"] < ratio["high"]
    assert ratio["low"] == pytest.approx(1 / inverse["high"])


def test_a_ratio_of_proportional_lengths_is_certain():
    """Pairing: problems may differ as they like if every one is cut to the same share."""
    estimate = intervals.ratio(0.4 * LENGTHS[:, 0], LENGTHS[:, 0])
    assert ends(estimate) == pytest.approx((0.4, 0.4))


def test_a_narrow_mean_has_the_t_interval():
    values = 1000 + RNG.normal(0, 1, 25)
    expected = stats.t.interval(0.95, 24, values.mean(), stats.sem(values))
    assert ends(intervals.mean(values)) == pytest.approx(expected, rel=1e-6)


def test_a_signed_mean_has_the_t_interval():
    values = np.array([-2.0, 0.5, 4.0])
    estimate = intervals.signed_mean(values)
    expected = stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
    assert estimate["value"] == values.mean()
    assert ends(estimate) == pytest.approx(expected)
    assert ends(intervals.signed_mean(values[:1])) == (None, None)
    assert ends(intervals.signed_mean(np.zeros(3))) == (0.0, 0.0)


def test_a_proportion_of_single_responses_has_wilsons_interval():
    """At one response a problem; the t quantile and the sample variance make it a bit wider."""
    values = np.repeat([1.0, 0.0], [1600, 400])
    expected = stats.binomtest(1600, 2000).proportion_ci(method="wilson")
    assert ends(intervals.proportion(values, 1)) == pytest.approx(tuple(expected), abs=1e-4)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_right_or_all_wrong_is_not_certain(value):
    estimate = intervals.proportion(np.full(30, value), 8)
    assert estimate["value"] == value
    assert estimate["low"] <= value <= estimate["high"]
    assert 0.05 < estimate["high"] - estimate["low"] < 0.2
    assert 0 <= estimate["low"] <= estimate["high"] <= 1


def test_more_samples_of_each_problem_narrow_a_proportion():
    rates = RNG.beta(4, 2, 2000)
    widths = []
    for samples in (1, 16):
        values = RNG.binomial(samples, rates) / samples
        estimate = intervals.proportion(values, samples)
        widths.append(estimate["high"] - estimate["low"])
    assert widths[1] < 0.6 * widths[0]


def test_a_difference_of_proportions_is_antisymmetric_and_near_the_t_interval():
    first, second = RNG.binomial(8, 0.7, 400) / 8, RNG.binomial(8, 0.6, 400) / 8
    estimate = intervals.difference_of_proportions(first, second, 8)
    mirrored = intervals.difference_of_proportions(second, first, 8)
    assert ends(estimate) == pytest.approx((-mirrored["high"], -mirrored["low"]))
    difference = first - second
    expected = stats.t.interval(0.95, 399, difference.mean(), stats.sem(difference))
    assert ends(estimate) == pytest.approx(expected, abs=2e-3)


def test_no_disagreement_is_not_certain():
    solved = RNG.binomial(1, 0.5, 30).astype(float)
    estimate = intervals.difference_of_proportions(solved, solved, 1)
    assert estimate["value"] == 0
    assert estimate["low"] == pytest.approx(-estimate["high"])
    assert 0.03 < estimate["high"] < 0.15


def test_a_difference_of_ratios_agrees_with_the_bootstrap():
    words = RNG.poisson(LENGTHS / 100)
    estimate = intervals.difference_of_ratios(
        words[:, 0], LENGTHS[:, 0], words[:, 1], LENGTHS[:, 1]
    )
    drawn = RNG.integers(len(LENGTHS), size=(4000, len(LENGTHS)))
    sums = words[drawn].sum(axis=1) / LENGTHS[drawn].sum(axis=1)
    low, high = np.quantile(sums[:, 0] - sums[:, 1], [0.025, 0.975])
    assert estimate["high"] - estimate["low"] == pytest.approx(high - low, rel=0.2)
    assert estimate["value"] == pytest.approx((low + high) / 2, abs=0.2 * (high - low))


def test_reductions_turn_the_interval_around():
    reduced = intervals.reduction({"value": 0.4, "low": 0.3, "high": 0.6})
    assert reduced == pytest.approx({"value": 0.6, "low": 0.4, "high": 0.7})


def test_a_single_problem_has_no_interval():
    one, two = np.array([0.5]), np.array([2.0])
    for estimate in (
        intervals.ratio(one, two),
        intervals.mean(one),
        intervals.proportion(one, 4),
        intervals.difference_of_proportions(one, two, 4),
        intervals.difference_of_ratios(one, two, two, one),
    ):
        assert ends(estimate) == (None, None)
        assert math.isfinite(estimate["value"])
    assert intervals.reduction(intervals.mean(one))["high"] is None


def test_a_ratio_without_denominator_is_an_error():
    with pytest.raises(ValueError, match="denominator"):
        intervals.ratio(np.ones(3), np.zeros(3))


def test_intervals_cover_the_truth():
    """The simulation of scripts/bench_intervals.py in short, give or take 3 sd of 1,000 draws."""
    bench = load_script("bench_intervals")
    rows = bench.coverage(bench.World(), 500, draws=1000, seed=0)
    assert {row["quantity"] for row in rows} == {
        "accuracy",
        "accuracy difference",
        "token reduction",
    }
    for row in rows:
        assert 0.929 < row["coverage"] < 0.971, row
