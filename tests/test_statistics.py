"""Statistics of graded responses against plain counting."""

import itertools
import json

import numpy as np
import pytest

from opsdc_jax import statistics
from opsdc_jax.statistics import Graded

PROBLEMS, SAMPLES = 24, 4


def rows(seed, solve=0.6, length=100):
    """Rows of grades.jsonl of a made-up system."""
    rng = np.random.default_rng(seed)
    made = []
    for index, sample in itertools.product(range(PROBLEMS), range(SAMPLES)):
        thinking, answer = int(rng.integers(1, 2 * length)), int(rng.integers(1, 9))
        correct = bool(rng.random() < solve)
        made.append(
            {
                "index": index,
                "sample": sample,
                "level": str(index % 3 + 1) if index < 20 else "",
                "scores": {"committed": correct, "boxed": correct and index % 2 == 0},
                "timed_out": False,
                "tokens": thinking + answer,
                "thinking_tokens": thinking,
                "answer_tokens": answer,
                "truncated": index == 0,
                "unparsed": index == 1,
                "repetitive": index == 2 and sample == 0,
                "doubt_words": int(rng.integers(0, 5)),
            }
        )
    return made


BASE_ROWS, STUDENT_ROWS = rows(0, length=200), rows(1, solve=0.7)
BASE, STUDENT = (Graded.from_rows(made, SAMPLES) for made in (BASE_ROWS, STUDENT_ROWS))


def mean(made, value):
    return pytest.approx(np.mean([value(row) for row in made]))


def test_describe_counts_responses():
    found = statistics.describe(BASE)
    assert (found["problems"], found["samples"]) == (PROBLEMS, SAMPLES)
    for scorer in ("committed", "boxed"):
        expected = mean(BASE_ROWS, lambda row, s=scorer: row["scores"][s])
        assert found["scores"][scorer]["value"] == expected
    for name in ("tokens", "thinking_tokens", "answer_tokens"):
        values = [row[name] for row in BASE_ROWS]
        assert found[name]["mean"]["value"] == pytest.approx(np.mean(values))
        assert found[name]["median"] == np.median(values)
        assert found[name]["p90"] == pytest.approx(np.percentile(values, 90))
    assert found["truncated"]["value"] == pytest.approx(1 / PROBLEMS)
    assert found["unparsed"]["value"] == pytest.approx(1 / PROBLEMS)
    assert found["repetitive"]["value"] == pytest.approx(1 / PROBLEMS / SAMPLES)
    words, tokens = (sum(row[name] for row in BASE_ROWS) for name in ("doubt_words", "tokens"))
    assert found["doubt_per_1000"]["value"] == pytest.approx(1000 * words / tokens)


def test_everything_is_json():
    for found in (statistics.describe(BASE), statistics.compare(STUDENT, BASE)):
        assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_pass_at_n_is_the_share_of_subsets_with_a_correct_response():
    rng = np.random.default_rng(0)
    correct = rng.random((20, 6)) < 0.3
    for draws in range(1, 7):
        expected = [
            np.mean([row[list(subset)].any() for subset in itertools.combinations(range(6), draws)])
            for row in correct
        ]
        np.testing.assert_allclose(statistics.pass_at(correct, draws), expected, atol=1e-12)


def test_pass_at_covers_powers_of_two_and_all_samples():
    graded = Graded.from_rows(rows(0)[: 8 * 12], 12)
    assert list(statistics.describe(graded)["pass_at"]) == ["1", "2", "4", "8", "12"]
    found = statistics.describe(BASE)
    assert found["pass_at"]["1"] == found["scores"]["committed"]


def test_compare_counts_each_reduction_its_own_way():
    found = statistics.compare(STUDENT, BASE)
    difference = np.mean([row["scores"]["committed"] for row in STUDENT_ROWS]) - np.mean(
        [row["scores"]["committed"] for row in BASE_ROWS]
    )
    assert found["scores"]["committed"]["value"] == pytest.approx(difference)

    def of_problem(made, index, correct_only=False):
        return [
            row["tokens"]
            for row in made
            if row["index"] == index and (row["scores"]["committed"] or not correct_only)
        ]

    means = [
        [np.mean(of_problem(made, index)) for index in range(PROBLEMS)]
        for made in (STUDENT_ROWS, BASE_ROWS)
    ]
    reduction = found["token_reduction"]
    assert reduction["overall"]["value"] == pytest.approx(1 - np.mean(means[0]) / np.mean(means[1]))
    assert reduction["per_problem"]["value"] == pytest.approx(
        1 - np.mean(np.array(means[0]) / np.array(means[1]))
    )
    pairs = [
        (of_problem(STUDENT_ROWS, index, True), of_problem(BASE_ROWS, index, True))
        for index in range(PROBLEMS)
    ]
    solved = np.array([(np.mean(s), np.mean(b)) for s, b in pairs if s and b])
    assert 0 < len(solved) < PROBLEMS
    assert found["problems_both_solve"] == len(solved)
    expected = 1 - solved[:, 0].mean() / solved[:, 1].mean()
    assert reduction["both_solve"]["value"] == pytest.approx(expected)
    assert found["truncated"]["value"] == 0


def test_the_pairing_narrows_the_interval():
    """Twice the same lengths: certain. The same lengths with problems exchanged: not at all."""
    same = statistics.compare(BASE, BASE)["token_reduction"]["overall"]
    assert (same["low"], same["high"]) == pytest.approx((0, 0))
    shuffled = BASE.select(np.roll(np.arange(PROBLEMS), 1))
    other = statistics.compare(shuffled, BASE)["token_reduction"]["overall"]
    assert other["value"] == pytest.approx(0)
    assert other["high"] - other["low"] > 0.2


def test_what_does_not_exist_is_null():
    unsolved = [row | {"scores": {"committed": False, "boxed": False}} for row in BASE_ROWS]
    silent = [row | {"thinking_tokens": 0} for row in unsolved]
    found = statistics.compare(STUDENT, Graded.from_rows(silent, SAMPLES))
    assert found["token_reduction"]["both_solve"] is None
    assert found["problems_both_solve"] == 0
    assert found["thinking_reduction"] is None


def test_levels_are_ordered_and_unnamed_ones_left_out():
    groups = statistics.by_level(BASE)
    assert list(groups) == ["1", "2", "3"]
    assert sorted(np.concatenate(list(groups.values()))) == list(range(20))
    for level, problems in groups.items():
        assert set(BASE.select(problems).levels) == {level}
    names = ["10", "hard", "2", "geometry", "medium", "easy"]
    assert sorted(names, key=statistics.level_rank) == [
        *("easy", "medium", "hard", "2", "10", "geometry")
    ]


def test_pass_rate_bins_split_the_problems():
    correct = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    graded = Graded({"committed": correct.astype(bool)}, {}, {}, [""] * 5)
    bins = {name: problems.tolist() for name, problems in statistics.by_pass_rate(graded).items()}
    assert bins == {"100%": [0], "50-99%": [1, 2], "1-49%": [3], "0%": [4]}
    assert list(statistics.by_pass_rate(graded.select(np.array([4, 0])))) == ["100%", "0%"]
