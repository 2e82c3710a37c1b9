"""Words ranked by how much the teacher disagrees with them."""

import collections
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from opsdc_jax.report.run import View

NUMBER = "(any number)"
_ROWS = 15  # of a table
_RARE = 3  # a word sampled less often has no place among the means
_NUMERAL = re.compile(r"[\d.,]*\d")


class Word(NamedTuple):
    """A word over all its occurrences.

    Attributes:
      times: how often it was sampled.
      total, mean: reverse KL of its tokens, in nats: summed, and per occurrence.
      share: of the divergence of all words.
      student_prob, teacher_prob: its mean probability where it was sampled.
    """

    text: str
    times: int
    total: float
    mean: float
    share: float
    student_prob: float
    teacher_prob: float


def rank(rollouts: Iterable[Mapping[str, Any]]) -> list[Word]:
    """All words, by their summed reverse KL. Numbers count as one word.

    Args:
      rollouts: as in samples/tokens-*.jsonl.
    """
    groups: dict[str, list[tuple[float, float, float]]] = collections.defaultdict(list)
    for rollout in rollouts:
        for text, tokens in split(rollout["tokens"]):
            kl = sum(rollout["kl"][tokens.start : tokens.stop])
            student = teacher = 1.0
            for index in tokens:
                student *= rollout["student_prob"][index]
                teacher *= rollout["teacher_prob"][index]
            name = NUMBER if _NUMERAL.fullmatch(text) else text
            groups[name].append((kl, student, teacher))
    everything = sum(kl for group in groups.values() for kl, _, _ in group)
    words = []
    for text, group in groups.items():
        total, student, teacher = (sum(column) for column in zip(*group, strict=True))
        count = len(group)
        share = total / everything if everything > 0 else 0.0
        words.append(
            Word(text, count, total, total / count, share, student / count, teacher / count)
        )
    return sorted(words, key=lambda word: -word.total)


class Table(NamedTuple):
    """A ranking: `rows` are (word, its figure as text, the figure's part of the largest)."""

    caption: str
    column: str
    rows: list[tuple[Word, str, float]]


def tables(views: Sequence[View]) -> list[Table]:
    """The words of the first and of the last step; both by share, the first also by mean."""
    if not views:
        return []
    first, last = (rank(view.rollouts) for view in (views[0], views[-1]))
    often = sorted((w for w in first if w.times >= _RARE), key=lambda word: -word.mean)
    by_mean = [(word, f"{word.mean:.2f}", word.mean) for word in often]
    found = [
        _table(f"Step {views[0].step}, by share of the divergence", "share, %", _by_share(first)),
        _table(f"Step {views[0].step}, each time (of {_RARE} and more)", "nats", by_mean),
    ]
    if len(views) > 1:
        title = f"Step {views[-1].step}, by share of the divergence"
        found.append(_table(title, "share, %", _by_share(last)))
    return found


def _by_share(ranked: Sequence[Word]) -> list[tuple[Word, str, float]]:
    return [(word, f"{100 * word.share:.1f}", word.share) for word in ranked]


def _table(caption: str, column: str, rows: Sequence[tuple[Word, str, float]]) -> Table:
    largest = max((figure for _, _, figure in rows), default=0.0) or 1.0
    shown = [(word, text, max(figure, 0.0) / largest) for word, text, figure in rows[:_ROWS]]
    return Table(caption, column, shown)


def split(pieces: Sequence[str]) -> Iterator[tuple[str, range]]:
    """Joins the texts of tokens to words: (word, the tokens it is made of).

    A word goes on over tokens whose texts meet as two letters or digits; what is only space
    belongs to no word.
    """
    start, word = 0, ""
    for index, piece in enumerate(pieces):
        joined = piece and word and word[-1].isalnum() and piece[0].isalnum()
        if not joined and piece:
            if word.strip():
                yield word.strip(), range(start, index)
            start, word = index, ""
        word += piece
    if word.strip():
        yield word.strip(), range(start, len(pieces))
