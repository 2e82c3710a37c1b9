"""Answer extraction and equivalence."""

import re

_END_OF_THOUGHT = "</think>"
_ANSWER_LINE = re.compile(r"Answer\s*:\s*(\S[^\n]*)")


def committed_answer(response: str) -> str | None:
    """The last "Answer: X" after `</think>`, or None.

    Without `</think>` the whole response counts, unless a thought was opened and never closed.
    """
    if _END_OF_THOUGHT in response:
        response = response.rsplit(_END_OF_THOUGHT, 1)[1]
    elif "<think>" in response:
        return None
    found = _ANSWER_LINE.findall(response)
    return found[-1].strip() if found else None


def is_correct(response: str, gold: str, *, truncated: bool = False) -> bool:
    """Whether the committed answer is the gold answer; a truncated response never is.

    Args:
      response: text without the end-of-sequence token.
    """
    return not truncated and committed_answer(response) == gold.strip()
