"""A single answer taken apart: its name ("x ="), words and unit, percent sign and value."""

import re
from fractions import Fraction
from typing import NamedTuple

from opsdc_jax.grading.clean import FUNCTION_NAMES


class Number(NamedTuple):
    """An exact rational number as written.

    Attributes:
      places: decimals written, or None where it is no decimal fraction.
      digits: significant digits written, of a decimal fraction.
    """

    value: Fraction
    places: int | None = None
    digits: int = 0


class Quantity(NamedTuple):
    """A single answer.

    Attributes:
      core: the expression without the rest.
      number: its value where it is a rational number as written.
      name: the left side of "x = 5"; None where there is none or it is a function.
      unit: canonical name of a known unit with its power, ("cm", 2).
      percent: whether a percent sign follows.
    """

    core: str
    number: Number | None
    name: str | None
    unit: tuple[str, int] | None
    percent: bool


_UNITS = {
    alias: unit
    for unit, aliases in {
        "mm": "mm millimeter millimetre",
        "cm": "cm centimeter centimetre",
        "m": "m meter metre",
        "km": "km kilometer kilometre",
        "inch": "in inch inche",
        "foot": "ft foot feet",
        "yard": "yd yard",
        "mile": "mi mile",
        "mg": "mg milligram",
        "g": "g gram",
        "kg": "kg kilogram",
        "ounce": "oz ounce",
        "pound": "lb pound",
        "ml": "ml mL milliliter millilitre",
        "liter": "L l liter litre",
        "second": "s sec second",
        "minute": "min minute",
        "hour": "h hr hour",
        "day": "day",
        "week": "week",
        "month": "month",
        "year": "yr year",
        "dollar": "dollar USD",
        "cent": "cent",
        "degree": "degree deg",
        "radian": "radian rad",
        "mph": "mph",
        "kph": "kph",
    }.items()
    for alias in aliases.split()
}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
# Words that change what is said: an answer with one of them is not just its number.
_RESERVED = frozenset(
    """and or not no none never either neither nor maybe perhaps possibly unless except between than
    least most over under above below through but all any to mod modulo base if for when else
    infinitely does undefined""".split()  # noqa: SIM905
)
_WORD = r"(?<![\\A-Za-z_^])[A-Za-z][A-Za-z'-]+(?![A-Za-z(_])"
# Leading words: before a number, a formula or a bracket, and not mere letters to be multiplied.
_LEAD = re.compile(
    rf"(?:{_WORD}[\s:]*)*(?:is|are|be|of|at|has|have|was|[A-Za-z'-]{{3,}})[\s:]+"
    r"(?=[-\d\\(\[{.]|[A-Za-z](?![A-Za-z]))"
)
_POWER = r"(?:\s*\^\s*\{?\s*[23]\s*\}?)?"
_UNIT_NAMES = "|".join(sorted(_UNITS, key=len, reverse=True))
# Words after a number or a closing bracket: any after a space, known units of two letters and more
# without one. A single letter is a unit only after a number and a space.
_TAIL = re.compile(
    rf"(?:(?<=[0-9)}}\]%.])|(?<=\\pi))(?:\s*(?:(?!\b[A-Za-z]\b)(?:{_UNIT_NAMES})s?(?![A-Za-z(_])"
    rf"|(?<=\s)\(?[A-Za-z][A-Za-z'-]{{2,}}\)?(?![A-Za-z(_])|(?:(?<=\d\s)|(?<=/))[mgLsh](?![A-Za-z(_])"
    rf"|(?<=[a-z]\s)(?:of|a|an|in|on|at|by|is))"
    rf"{_POWER}[.,/]?)+$"
)
_NAME = re.compile(r"([A-Za-z](?:_\{?\w+\}?)?|\\[a-z]+)(\s*\([a-z]\))?\s*=(?!=)\s*(?=\S)")
_INTEGER = r"\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+"
_NUMBER = rf"(?:(?:{_INTEGER})(?:\.\d*)?|\.\d+)"
_PLAIN = re.compile(rf"(?P<whole>{_INTEGER})?(?:\.(?P<decimals>\d*))?")
_FRACTION = re.compile(
    rf"(?:(?P<whole>\d+)(?:\s+|\s*(?=\\)))?"
    rf"(?:\\frac\{{\s*(?P<a>-?{_NUMBER})\s*\}}\{{\s*(?P<b>-?{_NUMBER})\s*\}}"
    rf"|(?P<c>{_NUMBER})\s*/\s*(?P<d>{_NUMBER}))"
)
_SCIENTIFIC = re.compile(
    rf"(?P<a>{_NUMBER})\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{{\s*(?P<b>-?\d{{1,3}})\s*\}}|(?P<c>\d))"
)
_REPEATING = re.compile(r"(?P<whole>\d*)\.(?P<start>\d*)\\(?:overline|bar)\s*\{(?P<loop>\d+)\}")
_EQUALS = re.compile(r"(?<![<>!\\])=")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_APPROXIMATELY = re.compile(r"\\approx(?![A-Za-z])")


def quantity(text: str) -> Quantity:
    """Takes a cleaned single answer apart."""
    exact, *rounded = _APPROXIMATELY.split(text)
    if rounded and not re.fullmatch(r"\s*[A-Za-z]?\s*", exact):
        text = exact
    elif rounded:
        text = f"{exact}={rounded[0]}" if exact.strip() else rounded[0]
    text = without_lead(text.strip())
    name = None
    if match := _NAME.match(text):
        name = None if match[2] else match[1]
        text = text[match.end() :]
        text = _EQUALS.split(text)[-1].strip()
    else:
        # "3 + 4 = 7" says 7; an equation in letters stays one.
        *left, right = _EQUALS.split(text)
        if left and number(right) and not re.search("[a-z]", _COMMAND.sub("", left[0])):
            text = right.strip()
    text, words = _without_tail(text)
    unit = _unit(words)
    percent = "percent" in words or text.endswith("%")
    core = text.rstrip("% ").strip()
    return Quantity(core, number(core), name, unit, percent)


def without_lead(text: str) -> str:
    """The text after leading words such as "The answer is", if they take nothing back."""
    match = _LEAD.match(text)
    if match is None or _takes_back(match[0]):
        return text
    return text[match.end() :].strip()


def number(text: str) -> Number | None:
    """The rational number a cleaned text writes out, exactly, or None."""
    text = text.strip()
    sign = -1 if text.startswith("-") else 1
    value = _exact(text.lstrip("+-").strip() if re.match(r"[+-]\s*[^+\-\s]", text) else text)
    return None if value is None else value._replace(value=sign * value.value)


def _exact(text: str) -> Number | None:
    if match := _PLAIN.fullmatch(text):
        return _plain(match)
    if match := _FRACTION.fullmatch(text):
        top, bottom = _value(match["a"] or match["c"]), _value(match["b"] or match["d"])
        if not bottom:
            return None
        return Number(int(match["whole"] or 0) + top / bottom)
    if match := _SCIENTIFIC.fullmatch(text):
        return Number(_value(match["a"]) * Fraction(10) ** int(match["b"] or match["c"]))
    if match := _REPEATING.fullmatch(text):
        start, loop = match["start"], match["loop"]
        tail = Fraction(int(loop), (10 ** len(loop) - 1) * 10 ** len(start))
        return Number(_value(f"{match['whole'] or 0}.{start or 0}") + tail)
    return None


def _plain(match: re.Match[str]) -> Number | None:
    whole, decimals = match["whole"], match["decimals"]
    if whole is None and not decimals:
        return None
    digits = re.sub("[, ]", "", whole or "") + (decimals or "")
    value = Fraction(int(digits or 0), 10 ** len(decimals or ""))
    if not decimals:
        return Number(value)
    return Number(value, len(decimals), len(digits.lstrip("0")))


def _value(text: str) -> Fraction:
    return Fraction(re.sub("[, ]", "", text).rstrip("."))


def _without_tail(text: str) -> tuple[str, list[str]]:
    match = _TAIL.search(text)
    if match is None or _takes_back(match[0]):
        return text, []
    head = text[: match.start()].strip()
    return (head, re.findall(r"[A-Za-z]+|[23]", match[0])) if head else (text, [])


def _takes_back(words: str) -> bool:
    found = {word.lower() for word in re.findall(r"[A-Za-z]+", words)}
    return bool(found & _RESERVED or found & FUNCTION_NAMES or "n't" in words)


def _unit(words: list[str]) -> tuple[str, int] | None:
    power = 1
    for index, word in enumerate(words):
        power = _POWERS.get(word, power)
        unit = _UNITS.get(word) or _UNITS.get(word.lower().removesuffix("s"))
        if unit:
            following = words[index + 1] if index + 1 < len(words) else ""
            return unit, int(following) if following in ("2", "3") else power
    return None
