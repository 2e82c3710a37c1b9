"""The scorers: which answers of a response must be the gold answer."""

from collections.abc import Set

from opsdc_jax.grading.equivalence import equivalent
from opsdc_jax.grading.extract import Answers, extract

SCORERS = ("answer_line", "boxed", "either", "committed")


def grade(response: str, gold: str, truncated: bool = False) -> dict[str, bool]:
    """Scorer name -> whether the response is right; see the package for the scorers.

    The same in any process and thread. Never raises, but may take very long, as there are answers
    that sympy never finishes with: grade what a model wrote with `grade_many`.

    Args:
      response: text without the end-of-sequence token.
      truncated: the budget cut the response.
    """
    answers = extract(response)
    right = {answer for answer in distinct(answers) if equivalent(answer, gold)}
    return scores(answers, right, truncated)


def scores(answers: Answers, right: Set[str], truncated: bool) -> dict[str, bool]:
    """The scores of a response with these answers, of which those in `right` equal the gold."""
    return {
        "answer_line": answers.answer_line in right,
        "boxed": answers.boxed in right,
        "either": not right.isdisjoint({answers.any_answer_line, answers.any_boxed}),
        "committed": not truncated and answers.committed in right,
    }


def distinct(answers: Answers) -> list[str]:
    """The different answers of a response, the committed one first."""
    ordered = (answers.committed, *answers)
    return list(dict.fromkeys(answer for answer in ordered if answer is not None))
