"""Whether an answer is the gold answer: letters, words, numbers, lists and sets; expressions last.

Both sides are cleaned, taken apart at their outermost structure, and compared part by part. Only a
part that is neither a number nor a word goes to math-verify (symbolic.py), which may be slow.
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from opsdc_jax.grading import symbolic
from opsdc_jax.grading.clean import FUNCTION_NAMES, clean
from opsdc_jax.grading.quantity import Number, Quantity, quantity, without_lead
from opsdc_jax.grading.structure import Parts, parts

LONGEST = 1000  # characters; anything longer is no answer, and equals only itself
DEEPEST = 30  # brackets in brackets; likewise. Parsing time grows steeply with depth
ROUNDED_DIGITS = 6  # a decimal of so many digits stands for the number it is the rounding of

_LETTER = re.compile(r"\(?\s*([A-J])\s*\)?")
_LETTER_FIRST = re.compile(r"\(?\s*([A-Ja-j])\s*(?:\)\s*|[.:]\s+|\s-\s|$)(.*)", re.DOTALL)
_OPTION = re.compile(
    r"(?:(?:the|correct|final|right|best|answer|option|choice|is)\b[\s:]*)+", re.IGNORECASE
)
_BASED = re.compile(r"\(?\s*([0-9][0-9A-Za-z]*)\s*\)?\s*_\s*\{?\s*(\d+)\s*\}?")
_ARTICLE = re.compile(r"(?:(?:the|a|an|it is|it's)\s+)+", re.IGNORECASE)
_IDLE_SPACE = re.compile(r"\s+(?![A-Za-z0-9])|(?<![A-Za-z0-9])\s+")
_ONLY_WORDS = re.compile(r"[A-Za-z][A-Za-z\s.'’-]*")


class Undecided(Exception):  # noqa: N818  not an error: an answer to "can you tell quickly?"
    """math-verify would be needed."""


def equivalent(answer: str, gold: str, *, quick: bool = False) -> bool:
    """Whether two answers mean the same.

    Args:
      quick: takes microseconds, and raises where it takes math-verify to tell. Without it nothing
        is raised, and the call may take arbitrarily long.

    Raises:
      Undecided: only if `quick`.
    """
    answer, gold = answer.strip(), gold.strip()
    if not answer or not gold:
        return False
    if answer == gold:
        return True
    if len(answer) > LONGEST or len(gold) > LONGEST:
        return False
    if max(_depth(answer), _depth(gold)) > DEEPEST:
        return False
    return _Comparison(quick).same(clean(answer), clean(gold))


def _depth(text: str) -> int:
    """How deep brackets of any kind stand in each other; those that close none do not count."""
    depth = deepest = 0
    for character in text:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth = max(0, depth - 1)
    return deepest


class _Comparison(NamedTuple):
    """Compares cleaned answers; `quick` as in `equivalent`.

    Conventions beyond equal values: lists and sets have no order, and equal length; a list without
    brackets may stand for a tuple, a tuple for a vector, an inequality for an interval; a unit, a
    degree or percent sign, or "x =" may be left out, but not be another one.
    """

    quick: bool

    def same(self, answer: str, gold: str) -> bool:
        if _squeezed(answer) == _squeezed(gold):
            return bool(gold)
        if letter := _LETTER.fullmatch(gold):
            return _chosen_letter(answer) == letter[1]
        answer, gold = without_lead(answer), without_lead(gold)
        if _BASED.fullmatch(gold) or _BASED.fullmatch(answer):
            return _same_based(answer, gold)
        a, g = parts(answer), parts(gold)
        if a.kind == "one" and g.kind == "one":
            return self._same_single(a.items[0], g.items[0])
        return self._same_parts(a, g)

    def _same_parts(self, a: Parts, g: Parts) -> bool:
        if a.kind == "alternatives" and all(self.same(item, g.source) for item in a.items):
            return True
        if len(a.items) != len(g.items):
            return False
        if {a.kind, g.kind} <= {"list", "alternatives", "set", "one"}:
            return self._same_unordered(a.items, g.items)
        if a.kind == g.kind == "union":
            return self._same_unordered(a.items, g.items)
        if g.kind in ("tuple", "column") and a.kind in ("tuple", "column", "list"):
            brackets = {side.brackets for side in (a, g) if side.kind == "tuple"}
            if len(brackets) > 1 and len(g.items) == 2:
                return False  # open and closed ends of intervals
            return all(map(self.same, a.items, g.items))
        if a.kind == g.kind:  # matrices, row by row
            return all(map(self.same, a.items, g.items))
        return False

    def _same_unordered(self, answers: Sequence[str], golds: Sequence[str]) -> bool:
        left = list(golds)
        for answer in answers:
            match = next((gold for gold in left if self.same(answer, gold)), None)
            if match is None:
                return False
            left.remove(match)
        return True

    def _same_single(self, answer: str, gold: str) -> bool:
        if _is_text(gold) or _is_text(answer):
            return _text(answer) == _text(gold)
        a, g = quantity(answer), quantity(gold)
        if a.name and g.name and a.name != g.name:
            return False
        if a.unit and g.unit and a.unit != g.unit:
            return False
        if a.number and g.number:
            return _same_number(a, g)
        if _squeezed(a.core) == _squeezed(g.core):
            return bool(g.core)
        for decimal, other in ((a, g), (g, a)):
            if decimal.number and decimal.number.places is not None:
                return self._is_decimal_of(decimal.number, other.core)
        if self.quick:
            raise Undecided
        return symbolic.same_expression(a.core, g.core)

    def _is_decimal_of(self, decimal: Number, expression: str) -> bool:
        if self.quick:
            raise Undecided
        return symbolic.is_decimal_of(decimal.value, expression, _rounding(decimal))


def _same_number(a: Quantity, g: Quantity) -> bool:
    """Equal values. A percent sign may stand on one side only: 50% is 0.5, and answers 50."""
    assert a.number is not None
    assert g.number is not None
    if a.percent == g.percent:
        return _same_value(a.number, g.number)
    percent, other = (a.number, g.number) if a.percent else (g.number, a.number)
    if percent.value / 100 == other.value:
        return True
    return percent.value == other.value and abs(other.value) >= 1


def _same_value(a: Number, g: Number) -> bool:
    if a.value == g.value:
        return True
    for decimal, other in ((a, g), (g, a)):
        if other.places is None and not _has_finite_decimal(other.value):
            return abs(decimal.value - other.value) <= _rounding(decimal)
    return False


def _rounding(decimal: Number) -> Fraction:
    """How far a number without a finite decimal may be from the decimal that stands for it."""
    if decimal.places is None or decimal.digits < ROUNDED_DIGITS:
        return Fraction(0)
    return Fraction(1, 2 * 10**decimal.places)


def _has_finite_decimal(value: Fraction) -> bool:
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def _squeezed(text: str) -> str:
    """Without the spaces that part nothing: "4 3" is not "43"."""
    return _IDLE_SPACE.sub("", text)


def _chosen_letter(answer: str) -> str | None:
    answer = _OPTION.sub("", answer, count=1) if _OPTION.match(answer) else answer
    match = _LETTER_FIRST.fullmatch(answer)
    if match is None or re.match(r"(?:and|or|,|/|&)", match[2].strip()):
        return None
    return match[1].upper()


def _same_based(answer: str, gold: str) -> bool:
    """Equal digits in the gold's base ("52_8"), which the answer need not repeat.

    The value in another base is not what was asked for.
    """
    (digits, base), (gold_digits, gold_base) = _based(answer), _based(gold)
    return digits == gold_digits and base in (gold_base, None if gold_base else "10")


def _based(text: str) -> tuple[str, str | None]:
    match = _BASED.fullmatch(text)
    digits, base = match.groups() if match else (text.strip("() "), None)
    return digits.lstrip("0").upper(), base


def _is_text(text: str) -> bool:
    """Words rather than mathematics: only letters, and four in a row or several words."""
    words = re.findall(r"[A-Za-z]+", text)
    return (
        bool(_ONLY_WORDS.fullmatch(text))
        and not FUNCTION_NAMES.intersection(words)
        and (max(map(len, words)) >= 4 or (len(words) > 1 and min(map(len, words)) > 1))
    )


def _text(text: str) -> str:
    text = _ARTICLE.sub("", text, count=1) if _ARTICLE.match(text) else text
    return re.sub(r"[\s.-]+", " ", text).strip().casefold()
