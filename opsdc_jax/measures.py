"""What is measured on one response besides its answer: thought and answer, loops, words of doubt."""

import re
from collections.abc import Sequence

import numpy as np

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
# A loop: the response ends in at least LOOP_COPIES copies of one block of at most LOOP_BLOCK tokens,
# which together are at least LOOP_TOKENS long (a row of zeros in a number is no loop).
LOOP_COPIES, LOOP_BLOCK, LOOP_TOKENS = 4, 128, 48


def doubt_words(text: str) -> int:
    """How many of `DOUBT_WORDS` stand in a text; words within a counted phrase do not count again."""
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
    if end_think_id is not None and end_think_id in ids:
        return len(ids) - list(reversed(ids)).index(end_think_id)
    opened = thought_open or (think_id is not None and think_id in ids)
    return len(ids) if opened else 0
