"""Whether responses answer their problems: four scorers, and many gradings under a time limit.

    answer_line  the last "Answer: X" after the thought
    boxed        the last \\boxed{X} after the thought
    either       the last of either kind in the whole response, thought included: the dual path of
                 the OPSDC paper (arXiv 2603.05433)
    committed    whichever of the first two comes last; a truncated response is wrong. The headline.

The thought ends at the last `</think>`; without one the whole response counts, unless a thought was
opened. Answers are compared by meaning (equivalence.py; math-verify for expressions). An answer
that offers alternatives is wrong, unless they are the gold's.
"""

from opsdc_jax.grading.extract import Answers, committed_answer, extract
from opsdc_jax.grading.pool import MEMORY, SECONDS, Grade, grade_many
from opsdc_jax.grading.scores import SCORERS, grade

__all__ = [
    "MEMORY",
    "SCORERS",
    "SECONDS",
    "Answers",
    "Grade",
    "committed_answer",
    "extract",
    "grade",
    "grade_many",
]
