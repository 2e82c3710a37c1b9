"""A raw row of a data set -> an `Example`, or the reason why it cannot be one.

Every row is judged by itself, by these rules:

- A column counts where it is present and not null; of several candidates the first one counts. A
  dotted name looks into nested objects. A name given by the user is the only candidate.
- The problem is a text, or chat messages with exactly one, the user's. A DAPO wrapping is removed
  at both ends. Otherwise the text stays as it is.
- A `choices` column (a list of texts; an empty one counts as absent) is appended to the problem as
  lettered options, and the answer, an index from 0 or a letter, becomes a letter.
- The answer is a text or a number; of GSM8K's solutions what follows "####" on the last line.
"""

import math
import re
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from opsdc_jax.prompts import TEMPLATES

PROBLEM_COLUMNS = ("problem", "question", "prompt")
ANSWER_COLUMNS = ("answer", "ground_truth", "reward_model.ground_truth", "label")
LEVEL_COLUMNS = ("level",)
_CHOICES_COLUMN = "choices"

_PREFIX, _REMINDER = TEMPLATES["dapo"].student.split("{problem}")
_GSM8K_ANSWER = re.compile(r"^####(.*)\Z", re.MULTILINE)
_MISSING = object()


class Example(NamedTuple):
    """One problem.

    Attributes:
      problem: its text, without any wrapping.
      answer: the gold answer; empty where the data has none (training needs none).
      level: difficulty, as the data set names it; empty where it names none.
    """

    problem: str
    answer: str
    level: str


class BadRowError(ValueError):
    """The row cannot be used; the message says why, without saying where."""


@dataclass(frozen=True)
class Columns:
    """Names of columns; an empty one stands for the candidates at the top of this file."""

    problem: str = ""
    answer: str = ""
    level: str = ""


def to_example(row: Any, columns: Columns) -> Example:
    """The example that a row holds.

    Args:
      row: what the file or data set gave; a mapping, if the row is good.

    Raises:
      BadRowError: the reason.
    """
    if not isinstance(row, Mapping):
        raise BadRowError(f"is {_kind(row)}, not an object with columns")
    name, value = _find(row, columns.problem, PROBLEM_COLUMNS, required=True)
    if value is None:
        raise BadRowError(f"{name} is null")
    problem = _unwrapped(_message(value, name))
    answer_name, answer = _find(row, columns.answer, ANSWER_COLUMNS, required=bool(columns.answer))
    if row.get(_CHOICES_COLUMN):
        options = _options(row[_CHOICES_COLUMN])
        problem = f"{problem}\n\n" + "\n".join(f"{letter}. {text}" for letter, text in options)
        answer = _letter(answer, answer_name, options)
    level_name, level = _find(row, columns.level, LEVEL_COLUMNS, required=bool(columns.level))
    return Example(problem, _final(_scalar(answer, answer_name)), _scalar(level, level_name))


def _find(
    row: Mapping[str, Any], given: str, candidates: tuple[str, ...], *, required: bool
) -> tuple[str, Any]:
    """Name and value of the column that counts; the value is None if there is none or it is null.

    Raises:
      BadRowError: the column is required and the row has none of the candidates, not even null.
    """
    candidates = (given,) if given else candidates
    values = {name: _lookup(row, name) for name in candidates}
    present = {name: value for name, value in values.items() if value is not _MISSING}
    if required and not present:
        raise BadRowError(f"has no column {' or '.join(candidates)}, only {_listed(row)}")
    for name, value in present.items():
        if value is not None:
            return name, value
    return next(iter(present), candidates[0]), None


def _lookup(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column, or of a dotted path into nested objects; `_MISSING` if absent."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _MISSING
        value = value[part]
    return value


def _listed(names: Iterable[str], limit: int = 12) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "none") + more


def _kind(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


def _message(value: Any, name: str) -> str:
    """A problem's text: as it stands, or the one user message of a chat."""
    if isinstance(value, Mapping) and isinstance(value.get("role"), list):
        # Several libraries store a list of messages as a mapping of lists.
        roles, contents = value["role"], value.get("content")
        if not isinstance(contents, list) or len(contents) != len(roles):
            raise BadRowError(f"{name} is a chat with unequal numbers of roles and contents")
        value = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    if isinstance(value, list):
        if not all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in value):
            raise BadRowError(f"{name} is a list of something else than chat messages")
        roles = [_text(message["role"], f"a role in {name}") for message in value]
        if roles != ["user"]:
            raise BadRowError(
                f"{name} is a chat of {_listed(roles)}: only one user message can be used"
            )
        value, name = value[0]["content"], f"the message in {name}"
    text = _text(value, name)
    if not text.strip():
        raise BadRowError(f"{name} is empty")
    return text


def _text(value: Any, name: str) -> str:
    """A str, or UTF-8 bytes, which no tokenizer can choke on."""
    try:
        if isinstance(value, bytes):
            return value.decode()
        if isinstance(value, str):
            value.encode()  # JSON can smuggle in half of a surrogate pair
            return value
    except UnicodeError:
        raise BadRowError(f"{name} is not valid Unicode") from None
    raise BadRowError(f"{name} is {_kind(value)}, not a text")


def _unwrapped(text: str) -> str:
    """The problem inside the DAPO wrapping; a text without wrapping comes back unchanged."""
    outer = text.strip()
    problem = outer.removeprefix(_PREFIX).removesuffix(_REMINDER)
    if _PREFIX.strip() in problem or _REMINDER.strip() in problem:
        raise BadRowError("part of the DAPO wrapping stands inside the problem")
    if not problem.strip():
        raise BadRowError("nothing but the DAPO wrapping")
    return text if problem == outer else problem


def _scalar(value: Any, name: str) -> str:
    """A text or a number as a stripped text; empty for null."""
    if value is None:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise BadRowError(f"{name} is not a finite number")
        return str(int(value)) if value == int(value) else repr(value)
    if not isinstance(value, str | bytes):
        raise BadRowError(f"{name} is {_kind(value)}, neither a text nor a number")
    return _text(value, name).strip()


def _final(answer: str) -> str:
    """The final answer of a GSM8K solution; any other answer as it is."""
    found = _GSM8K_ANSWER.search(answer)
    if not found:
        return answer
    if not found[1].strip():
        raise BadRowError('nothing follows "####" in the answer')
    return found[1].strip()


def _options(value: Any) -> list[tuple[str, str]]:
    """(letter, text) of every choice."""
    letters = string.ascii_uppercase
    if not isinstance(value, list) or not 2 <= len(value) <= len(letters):
        raise BadRowError(f"{_CHOICES_COLUMN} is not a list of 2 to {len(letters)} texts")
    if any(choice is None for choice in value):
        raise BadRowError(f"an option of {_CHOICES_COLUMN} is null")
    texts = [_scalar(choice, f"an option of {_CHOICES_COLUMN}") for choice in value]
    return list(zip(letters, texts, strict=False))


def _letter(answer: Any, name: str, options: list[tuple[str, str]]) -> str | None:
    """The letter of the right option, None if there is no answer."""
    letters = [letter for letter, _ in options]
    if answer is None:
        return None
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(letters):
        return letters[answer]
    if isinstance(answer, str | bytes) and (letter := _scalar(answer, name)) in letters:
        return letter
    raise BadRowError(f"{name}={answer!r} is neither an index from 0 nor a letter of the choices")
