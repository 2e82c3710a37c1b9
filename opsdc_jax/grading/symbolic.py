"""Equality of two single expressions, by math-verify and sympy. Can be slow without bound."""

import functools
import logging
import threading
from fractions import Fraction
from typing import Any

_LOCK = threading.Lock()  # parser and sympy share caches; a result must not depend on the thread
_DIGITS = 40  # of the numerical comparison of constants


def load() -> None:
    """Imports math-verify and sympy, about a second, which else the first comparison does."""
    _extraction()


def same_expression(answer: str, gold: str) -> bool:
    """Whether math-verify finds two cleaned LaTeX expressions, equations or relations equal.

    Constants must also agree to 40 digits, relative to their size: math-verify alone compares
    decimals after rounding to 6 places, so that 0.0000671 would equal 0.0000672.
    """
    from math_verify import verify

    with _LOCK:
        try:
            parsed, parsed_gold = _parse(answer), _parse(gold)
            if parsed is None or parsed_gold is None:
                return False
            values = _constant(_value(parsed)), _constant(_value(parsed_gold))
            if None not in values and not _close(*values):
                return False
            return bool(
                verify(parsed_gold, parsed, timeout_seconds=None, allow_set_relation_comp=True)
            )
        except Exception:  # whatever the libraries trip over is not an answer they can compare
            return False


def is_decimal_of(decimal: Fraction, expression: str, tolerance: Fraction) -> bool:
    """Whether a constant cleaned LaTeX expression is a real number that near to a decimal."""
    import sympy

    with _LOCK:
        try:
            parsed = _parse(expression)
            value = None if parsed is None else _constant(_value(parsed))
            if value is None or not value.is_real:
                return False
            exact = sympy.Rational(decimal.numerator, decimal.denominator)
            if _close(value, exact.evalf(_DIGITS)):
                return True
            return bool(abs(value - exact) <= sympy.Rational(*tolerance.as_integer_ratio()))
        except Exception:
            return False


@functools.cache
def _extraction() -> list[Any]:
    """math-verify's settings: the whole text is one LaTeX expression, and no unit is guessed at."""
    from latex2sympy2_extended.math_normalization import NormalizationConfig
    from math_verify import LatexExtractionConfig

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeouts are off
    rules = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
    )
    return [LatexExtractionConfig(boxed_match_priority=-1, normalization_config=rules)]


@functools.lru_cache(maxsize=4096)  # samples of one problem share their gold, and often more
def _parse(latex: str) -> Any:
    from math_verify import parse

    if "$" in latex or not latex.strip():
        return None
    found = parse(f"${latex}$", _extraction(), fallback_mode="no_fallback", parsing_timeout=None)
    return found[0] if len(found) == 1 else None


def _value(parsed: Any) -> Any:
    """The right side of "x = 2 + 3"; anything else as it is."""
    from math_verify.grader import unwrap_eq

    return unwrap_eq(parsed)


def _constant(parsed: Any) -> Any:
    """A number's value to `_DIGITS` digits, or None if it is none."""
    import sympy

    if not isinstance(parsed, sympy.Expr) or parsed.free_symbols:
        return None
    value = parsed.doit().evalf(_DIGITS)
    return value if value.is_number and value.is_finite else None


def _close(a: Any, b: Any) -> bool:
    scale = max(abs(a), abs(b))
    return bool(abs(a - b) <= scale * 10.0 ** (10 - _DIGITS))
