"""The same problem answered by the base model and by the student, picked by rule."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from opsdc_jax.report.run import Responses
from opsdc_jax.statistics import HEADLINE, level_rank

_LEVELS = 6  # shown at most
_HEAD, _TAIL = 3000, 1500  # characters shown of a long response: its start and its end


class Answer(NamedTuple):
    """One response."""

    text: str
    tokens: int
    correct: bool
    truncated: bool


class Pair(NamedTuple):
    """Both responses to one problem; `title` says why it is shown."""

    title: str
    problem: str
    gold: str
    base: Answer
    student: Answer


def select(responses: Responses) -> list[Pair]:
    """Of each level the median reduction, and of what only the base solved the median too.

    Reductions are 1 - student's tokens / base's tokens, of the first response to each problem.
    """
    base, student = (
        {row["index"]: row for row in files.read_grades() if row["sample"] == 0}
        for files in (responses.base, responses.student)
    )
    both = sorted(base.keys() & student.keys())
    picked: dict[int, str] = {}  # problem -> title

    def pick(problems: Iterable[int], title: str) -> None:
        index = _median(base, student, [index for index in problems if index not in picked])
        if index is not None:
            reduction = 1 - student[index]["tokens"] / base[index]["tokens"]
            change = f"{abs(reduction):.0%} {'fewer' if reduction >= 0 else 'more'} tokens"
            picked[index] = f"{title}: {change}"

    for level in sorted({base[index]["level"] for index in both}, key=level_rank)[:_LEVELS]:
        name = f"{level}, the median" if level else "The median"
        pick((i for i in both if base[i]["level"] == level), name[0].upper() + name[1:])
    lost = [i for i in both if _correct(base[i]) and not _correct(student[i])]
    pick(lost, f"Solved by the base only, one of {len(lost):,}")

    texts = [_texts(files.rows(), picked) for files in (responses.base, responses.student)]
    return [
        Pair(
            title,
            texts[0][index]["problem"],
            texts[0][index]["gold"],
            _answer(texts[0][index], base[index]),
            _answer(texts[1][index], student[index]),
        )
        for index, title in picked.items()
    ]


def _correct(grade: Mapping[str, Any]) -> bool:
    return grade["scores"][HEADLINE]


def _median(
    base: Mapping[int, Any], student: Mapping[int, Any], problems: Sequence[int]
) -> int | None:
    """The problem with the (lower) median reduction; of equal ones the first."""
    order = sorted(problems, key=lambda i: (1 - student[i]["tokens"] / base[i]["tokens"], i))
    return order[(len(order) - 1) // 2] if order else None


def _texts(rows: Iterable[Mapping[str, Any]], wanted: Mapping[int, Any]) -> dict[int, Any]:
    return {row["index"]: row for row in rows if row["sample"] == 0 and row["index"] in wanted}


def _answer(row: Mapping[str, Any], grade: Mapping[str, Any]) -> Answer:
    text = row["text"]
    left_out = len(text) - _HEAD - _TAIL
    if left_out > 0:
        text = f"{text[:_HEAD]}\n\n[{left_out:,} characters left out]\n\n{text[-_TAIL:]}"
    return Answer(text, grade["tokens"], _correct(grade), grade["truncated"])
