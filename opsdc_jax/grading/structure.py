"""The outermost structure of a cleaned answer: a list, a set, a tuple or interval, a matrix."""

import re
from typing import NamedTuple


class Parts(NamedTuple):
    """An answer taken apart once.

    Attributes:
      kind: "one" (a single answer), "list" (a comma or "and" between), "alternatives" ("or"
        between), "set", "tuple" (also intervals), "union", "column" (vector) or "matrix".
      items: the parts, as written.
      brackets: of a tuple, such as "(]".
      source: the whole.
    """

    kind: str
    items: tuple[str, ...]
    source: str
    brackets: str = ""


_TOKEN = re.compile(r"\\[{}]|\\[A-Za-z]+|[()\[\]{},;]|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])")
_OPENING = {"(": ")", "[": "]", "{": "}", "\\{": "\\}", "\\langle": "\\rangle"}
_CLOSING = frozenset(_OPENING.values())
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d*)?(?![\d,])[^,]*")
# "x \\in", "S =", "(x, y) =" before a set, tuple, interval or matrix
_MEMBER = re.compile(
    r"(?:[A-Za-z]|\([A-Za-z](?:\s*,\s*[A-Za-z])*\))\s*(?:\\in(?![A-Za-z])|=)\s*(?=[(\[\\])"
)
_MATRIX = re.compile(
    r"[(\[]?\s*\\begin\s*\{([pbBvV]?matrix|array)\}(?:\s*\{[clr|\s]*\})?(.*)\\end\s*\{\1\}\s*[)\]]?",
    re.DOTALL,
)
_RELATION = re.compile(r"(<|>|\\le(?![A-Za-z])|\\ge(?![A-Za-z]))")
_FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
_LETTERS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]")
_PLUS_MINUS = re.compile(r"\\pm(?![A-Za-z])\s*")
_MINUS_PLUS = re.compile(r"\\mp(?![A-Za-z])\s*")
_VARIABLE = re.compile(r"\s*[A-Za-z]\s*")


def parts(text: str) -> Parts:
    """Takes a cleaned answer apart at its outermost structure."""
    if _THOUSANDS.fullmatch(text):
        return Parts("one", (text,), text)
    if matrix := _MATRIX.fullmatch(text):
        return _matrix(matrix, text)
    for separators, kind in ((("or",), "alternatives"), ((",", ";", "and"), "list")):
        items = _split(text, separators)
        if len(items) > 1:
            if kind == "alternatives" and all(_interval(item) for item in items):
                return Parts("union", tuple(items), text)
            return Parts(kind, _expanded(items), text)
    if (member := _MEMBER.match(text)) and (whole := parts(text[member.end() :])).kind != "one":
        return whole
    text = _interval(text) or text
    union = _split(text, ("\\cup",))
    if len(union) > 1:
        return Parts("union", tuple(union), text)
    if bracketed := _bracketed(text):
        return bracketed
    expanded = _expanded([text])
    return Parts("one" if len(expanded) == 1 else "list", expanded, text)


def _split(text: str, separators: tuple[str, ...]) -> list[str]:
    """The pieces between separators that stand in no brackets; empty pieces are left out."""
    pieces, depth, start = [], 0, 0
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in _OPENING:
            depth += 1
        elif token in _CLOSING:
            depth -= 1
        elif depth == 0 and token in separators:
            pieces.append(text[start : match.start()])
            start = match.end()
    pieces.append(text[start:])
    return [piece.strip() for piece in pieces if piece.strip()]


def _bracketed(text: str) -> Parts | None:
    """A set, tuple or interval, if one pair of brackets spans the text."""
    tokens = [
        match for match in _TOKEN.finditer(text) if match[0] in _OPENING or match[0] in _CLOSING
    ]
    if not tokens or tokens[0].start() != 0 or tokens[0][0] not in _OPENING:
        return None
    depth = 0
    for index, match in enumerate(tokens):
        depth += 1 if match[0] in _OPENING else -1
        if depth == 0 and index < len(tokens) - 1:
            return None
    if depth != 0 or tokens[-1].end() != len(text):
        return None
    opening, closing = tokens[0][0], tokens[-1][0]
    inside = text[tokens[0].end() : tokens[-1].start()].strip()
    items = _split(inside, (",", ";"))
    if opening in ("\\{", "{") and items and "|" not in inside and "\\mid" not in inside:
        return Parts("set", _expanded(items), text)
    if len(items) < 2:
        return parts(inside) if inside and opening == "(" else None
    kind = "()" if opening == "\\langle" else opening + closing
    return Parts("tuple", tuple(items), text, kind)


def _expanded(items: list[str]) -> tuple[str, ...]:
    """The items with "a \\pm b" written out as two."""
    written = []
    for item in items:
        if _PLUS_MINUS.search(item):
            for plus, minus in ("+-", "-+"):
                signed = _MINUS_PLUS.sub(minus, _PLUS_MINUS.sub(plus, item)).strip()
                written.append(re.sub(r"^\+\s*|(?<==)\s*\+", "", signed))
        else:
            written.append(item)
    return tuple(written)


def _matrix(match: re.Match[str], text: str) -> Parts:
    rows = [row.strip() for row in re.split(r"\\\\", match[2]) if row.strip()]
    if match[1] in ("vmatrix", "Vmatrix"):
        return Parts("one", (text,), text)  # a determinant or a norm is a number
    if any("&" in row for row in rows):
        rows = ["(" + row.replace("&", ",") + ")" for row in rows]
        return Parts("matrix", tuple(rows), text)
    return Parts("column", tuple(rows), text)


def _interval(text: str) -> str | None:
    """ "1 < x \\le 2" as "(1,2]", or None if the text bounds no letter by numbers."""
    pieces = [piece.strip() for piece in _RELATION.split(text)]
    if len(pieces) == 5 and _VARIABLE.fullmatch(pieces[2]):
        low, first, _, second, high = pieces
    elif len(pieces) == 3 and _VARIABLE.fullmatch(pieces[0]):
        _, relation, bound = pieces
        if relation in ("<", "\\le"):
            low, first, second, high = r"-\infty", "<", relation, bound
        else:
            low, first, second, high = bound, _FLIPPED[relation], "<", r"\infty"
    elif len(pieces) == 3 and _VARIABLE.fullmatch(pieces[2]):
        return _interval(f"{pieces[2]} {_FLIPPED[pieces[1]]} {pieces[0]}")
    else:
        return None
    if _LETTERS.search(f"{low} {high}"):
        return None
    if first in (">", "\\ge") and second in (">", "\\ge"):
        low, first, second, high = high, _FLIPPED[second], _FLIPPED[first], low
    if first in (">", "\\ge") or second in (">", "\\ge"):
        return None
    return f"{'(' if first == '<' else '['}{low},{high}{')' if second == '<' else ']'}"
