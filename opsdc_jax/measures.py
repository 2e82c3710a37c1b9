"""What is measured on one response besides its answer: lengths, loops, words of doubt."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

THINK, END_THINK = "<think>", "</think>"
"""The marks around a thought, one token each."""

DOUBT_WORDS = (
    "wait",
    "hmm",
    "but",
    "alternatively",
    "actually",
    "maybe",
    "perhaps",
    "hold on",
    "not sure",
    "on second thought",
    "let me check",
    "let me double-check",
    "let me verify",
    "let me re-check",
    "let me recheck",
    "let me reconsider",
    "let me rethink",
    "let me think again",
)
"""Words and phrases that open a doubt or a second look, in English; counted in any case."""

_DOUBT = re.compile(
    r"\b(?:" + "|".join(map(re.escape, DOUBT_WORDS)).replace(r"\ ", r"\s+") + r")\b", re.IGNORECASE
)
# A loop: the response ends in LOOP_COPIES or more copies of one block of at most LOOP_BLOCK tokens,
# together LOOP_TOKENS long or longer: a row of zeros in a number is no loop.
LOOP_COPIES, LOOP_BLOCK, LOOP_TOKENS = 4, 128, 48


def doubt_words(text: str) -> int:
    """How many of `DOUBT_WORDS` stand in a text."""
    return len(_DOUBT.findall(text))


def is_repetitive(ids: Sequence[int]) -> bool:
    """Whether a response ends in a loop.

    Args:
      ids: of the response, without the stop token.
    """
    tail = np.asarray(ids[-LOOP_COPIES * max(LOOP_BLOCK, LOOP_TOKENS) :])
    for block in range(1, min(LOOP_BLOCK, len(tail) // LOOP_COPIES) + 1):
        needed = max(LOOP_COPIES * block, LOOP_TOKENS)
        if needed <= len(tail) and np.array_equal(tail[-needed + block :], tail[-needed:-block]):
            return True
    return False


def thinking_tokens(
    ids: Sequence[int],
    think_id: int | None,
    end_think_id: int | None,
    *,
    thought_open: bool = False,
) -> int:
    """Tokens of the thought: up to and with the last `</think>`.

    A thought that was opened and never closed is the whole response; where none was opened, all of
    it is answer.

    Args:
      think_id, end_think_id: of the marks; None where the tokenizer has none.
      thought_open: the prompt ends inside a thought, so the response need not open one.
    """
    closed = _last(ids, end_think_id)
    if closed >= 0:
        return closed + 1
    return len(ids) if thought_open or _last(ids, think_id) >= 0 else 0


def mark_ids(tokenizer: Any) -> tuple[int | None, int | None]:
    """Ids of `THINK` and `END_THINK`; None where the tokenizer has none."""
    vocabulary = tokenizer.get_vocab()
    return vocabulary.get(THINK), vocabulary.get(END_THINK)


def with_its_thought(text: str, thought_open: bool) -> str:
    """A response as it is graded: a thought that the prompt opened begins with its mark again."""
    return THINK + text if thought_open else text


def is_thought_open(prompt: Sequence[int], think_id: int | None, end_think_id: int | None) -> bool:
    """Whether a prompt ends inside a thought, as the templates of some thinking models do."""
    return _last(prompt, think_id) > _last(prompt, end_think_id)


def _last(ids: Sequence[int], wanted: int | None) -> int:
    """Place of the last occurrence; -1 if there is none."""
    places = [] if wanted is None else np.flatnonzero(np.asarray(ids) == wanted).tolist()
    return places[-1] if places else -1
