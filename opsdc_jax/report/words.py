"""Words ranked by how much the teacher disagrees with them."""

import collections
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

NUMBER = "(any number)"
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
