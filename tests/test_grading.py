"""Grading agrees with a careful human grader, whatever a model writes."""

import json
import pathlib
import re
import threading
from fractions import Fraction

import numpy as np
import pytest
from grading_cases import DIFFERENT, RESPONSES, SAME
from hypothesis import given, settings
from hypothesis import strategies as st

from opsdc_jax import grading
from opsdc_jax.grading import symbolic
from opsdc_jax.grading.equivalence import Undecided, equivalent

DATA = pathlib.Path(__file__).parents[2] / "shared" / "data"
FILES = ("math500", "aime24", "aime25", "gsm8k_test")
WRAPPINGS = ("<think>Hm.</think>\nAnswer: {}", "<think>Hm.</think>\nSo it is \\boxed{{{}}}.")


def _pairs():
    return [(*pair, True) for pair in SAME] + [(*pair, False) for pair in DIFFERENT]


@pytest.mark.parametrize(("answer", "gold", "expected"), _pairs())
def test_answers_are_compared_by_meaning(answer, gold, expected):
    line, boxed = (grading.grade(wrapping.format(answer), gold) for wrapping in WRAPPINGS)
    verdict = {"either": expected, "committed": expected}
    in_line = expected and "\\boxed" in answer
    assert line == verdict | {"answer_line": expected, "boxed": in_line}
    assert boxed == verdict | {"answer_line": False, "boxed": expected}


@pytest.mark.parametrize(("response", "gold", "right"), RESPONSES)
def test_scorers(response, gold, right):
    truncated = response.endswith("...")
    scores = grading.grade(response.removesuffix("..."), gold, truncated)
    letters = {"answer_line": "L", "boxed": "B", "either": "E", "committed": "C"}
    assert scores == {scorer: letters[scorer] in right for scorer in grading.SCORERS}


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<think> 1 + 1 = 2 . </think> Answer : 2", "2"),
        ("<think> Answer : 3 </think> Answer : 4", "4"),
        ("<think> Answer : 3 </think> no idea", None),
        ("<think> Answer : 3", None),
        ("", None),
        ("</think> Answer : ", None),
        ("Answer: 1\n\\boxed{2} or 3", "\\boxed{2} or 3"),
    ],
)
def test_committed_answer(response, expected):
    assert grading.committed_answer(response) == expected


def test_a_response_without_an_answer_is_never_right():
    assert not any(grading.grade("no idea", "").values())
    assert not any(grading.grade("Answer: 5", "").values())


# ------------------------------------------------------------------------- golds of benchmarks


def _golds(name):
    path = DATA / f"{name}.jsonl"
    if not path.exists():
        pytest.skip("needs the benchmark files of ../shared/data")
    golds = [str(json.loads(line)["answer"]) for line in path.read_text().splitlines()]
    return [gold.rpartition("####")[2].strip() for gold in golds]


@pytest.mark.parametrize("name", FILES)
def test_golds_of_benchmarks_are_right(name):
    items = [
        (wrapping.format(gold), gold, False) for gold in _golds(name) for wrapping in WRAPPINGS
    ]
    right = [grade.scores["committed"] for grade in grading.grade_many(items)]
    assert np.mean(right) >= 0.995


@pytest.mark.parametrize("name", FILES)
def test_golds_do_not_need_the_shortcut_of_identical_text(name):
    # Respaced and in display style, so that the text differs where there is anything to differ.
    def respelled(gold):
        gold = re.sub(r"\\frac(?![A-Za-z])", r"\\dfrac", gold)
        return re.sub(r"\s*([+=,])\s*(?![\d!])", r" \1 ", gold) + "."

    items = [(f"Answer: ${respelled(gold)}$", gold, False) for gold in _golds(name)]
    right = [grade.scores["committed"] for grade in grading.grade_many(items)]
    assert np.mean(right) >= 0.995, [i for i, r in zip(items, right, strict=True) if not r]


# How this test decides what is equal: numbers by `_plain_value`, which shares no code with the
# grader; beyond numbers these (answer, gold), found by reading the list of golds.
EQUAL_GOLDS = {
    ("1,-2", "-2,1"),  # lists
    ("-2,1", "1,-2"),
    ("-2,1", "(-2,1)"),  # the entries of a tuple in its order, without the brackets
    ("2\\sqrt{5}", "2 \\sqrt{5}"),
    ("2 \\sqrt{5}", "2\\sqrt{5}"),
}


def _plain_value(gold):
    """The value of a gold that is a number, without its unit, name or dollar sign; else None."""
    text = re.sub(r"\\(?:text|mbox)\{[^}]*\}(\^2)?|\^\\circ|\\\$|^x=|\\!|,| ", "", gold)
    text = re.sub(r"\\d?frac(\d|\{-?\d+\})(\d+|\{\d+\})", r"\1/\2", text)
    text = text.replace("{", "").replace("}", "")
    return Fraction(text) if re.fullmatch(r"-?\d*\.?\d+(/\d+)?", text) else None


def test_a_gold_of_another_problem_is_right_only_if_it_says_the_same():
    golds = sorted(set(_golds("math500") + _golds("aime24") + _golds("aime25")))
    rng = np.random.default_rng(0)
    pairs = [
        (answer, gold)
        for gold in golds
        for answer in rng.choice(golds, 4, replace=False).tolist()
        if answer != gold
    ]
    # Every pair of the same value is tried, whatever the draw.
    lists = [gold for gold in golds if "," in gold and not gold[0].isdigit()]
    values = {gold: _plain_value(gold) for gold in golds if "," not in gold or "!" in gold}
    by_value = [
        (a, b) for a in values for b in values if a != b and values[a] == values[b] is not None
    ]
    pairs += by_value + [(a, b) for a in lists for b in lists if a != b] + list(EQUAL_GOLDS)
    grades = grading.grade_many([(f"Answer: {answer}", gold, False) for answer, gold in pairs])
    accepted = {p for p, grade in zip(pairs, grades, strict=True) if grade.scores["committed"]}
    assert accepted == set(by_value) | EQUAL_GOLDS.intersection(pairs)


def test_gsm8k_golds_of_other_problems_are_right_only_if_the_number_is_the_same():
    golds = _golds("gsm8k_test")
    pairs = [(golds[index - shift], gold) for shift in (1, 7) for index, gold in enumerate(golds)]
    grades = grading.grade_many([(f"Answer: {answer}", gold, False) for answer, gold in pairs])
    for (answer, gold), grade in zip(pairs, grades, strict=True):
        same = Fraction(answer.replace(",", "")) == Fraction(gold.replace(",", ""))
        assert grade.scores["committed"] == same, (answer, gold)


# ----------------------------------------------------------------- shortcuts, threads, robustness


def _quick(answer, gold):
    try:
        return equivalent(answer, gold, quick=True)
    except Undecided:
        return None


@pytest.mark.parametrize(("answer", "gold", "expected"), _pairs())
def test_the_quick_verdict_is_the_slow_one(answer, gold, expected):
    assert _quick(answer, gold) in (None, expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(-30, 30), st.integers(1, 30), st.integers(-30, 30), st.integers(1, 30))
def test_numbers_are_compared_as_math_verify_does(a, b, c, d):
    answer, gold = f"\\frac{{{a}}}{{{b}}}", f"\\frac{{{c}}}{{{d}}}" if d > 1 else str(c)
    assert _quick(answer, gold) is symbolic.same_expression(answer, gold)


def test_plain_integers_need_no_math_verify():
    for answer, gold in [("43", "43"), ("42", "43"), ("1,450", "1450"), ("-3", "3"), ("x", "x")]:
        assert _quick(answer, gold) is not None


def test_the_thread_makes_no_difference():
    found = []
    thread = threading.Thread(
        target=lambda: found.extend(equivalent(*pair) for pair in SAME[:60] + DIFFERENT[:40])
    )
    thread.start()
    thread.join()
    assert found == [True] * 60 + [False] * 40


# Texts that hold what graders trip over; powers are small, since grade() itself has no time limit.
_WORDS = r"""Answer: \boxed{ } { <think> </think> \frac \sqrt \text{ $ or and , ( ) [ ] \{ \} = <
    \pm \cup ^ _ 1 2.5 x \pi \\ & \begin{pmatrix} \end{pmatrix} % cm ０ ² ٣ \infty C even
    1,000 / | !"""
_PIECES = st.sampled_from([*_WORDS.split(), " ", "\n", "\x00", "\u202e", "\ud800"])
_TEXTS = st.one_of(st.text(max_size=40), st.lists(_PIECES, max_size=12).map("".join))


@settings(max_examples=150, deadline=None)
@given(_TEXTS, _TEXTS, st.booleans())
def test_any_text_gets_the_same_grade_twice(response, gold, truncated):
    first = grading.grade(response, gold, truncated)
    assert first == grading.grade(response, gold, truncated)
    assert set(first) == set(grading.SCORERS)
    assert not (truncated and first["committed"])
    equivalent(response, gold)


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 150_000,
        "{" * 1_000_000,
        "}" * 1_000_000,
        "Answer:" * 150_000,
        "Answer: " + "(" * 1_000_000,
        "Answer: " + " " * 1_000_000 + "1",
        "Answer" + "\n" * 1_000_000,
        "\\boxed{1}, " * 100_000,
        "<think>" * 150_000,
        "\\boxed{" * 100_000 + "1" + "}" * 100_000,
        "\x00" * 1_000_000 + "\ud800",
    ],
    ids=lambda text: text[:12].encode("unicode_escape").decode(),
)
def test_huge_responses_are_read_in_linear_time(text):
    assert not any(grading.grade(text, "7").values())
