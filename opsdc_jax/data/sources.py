"""Sources of problems. Step -> examples is a pure function of (seed, step): nothing to restore."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from opsdc_jax.config import InputError
from opsdc_jax.data.columns import Columns, Example
from opsdc_jax.data.loading import Accept, load
from opsdc_jax.data.tables import TableName
from opsdc_jax.tiny import task

# Random streams of the orders below.
_TRAIN_STREAM, _EVAL_STREAM = 0, 1
# Published benchmarks whose problems are in another split than "test".
_EVAL_SPLITS = {"HuggingFaceH4/aime_2024": "train", "yentinglin/aime_2025": "train"}


class Source(Protocol):
    """What training needs of a data source."""

    @property
    def report(self) -> str:
        """What was read and what was left out, for people; several lines."""
        ...

    def train(self, step: int, batch_size: int) -> list[Example]:
        """The examples of a step (steps count from 1)."""
        ...


class TinySource:
    """The embedded synthetic task (opsdc_jax/tiny): endless fresh problems."""

    report = "tiny: fresh problems of the embedded task, without end"

    def __init__(self, seed: int):
        self._seed = seed

    def train(self, step: int, batch_size: int) -> list[Example]:
        first = (step - 1) * batch_size
        return [_tiny(self._seed, first + row, "train") for row in range(batch_size)]


def tiny_evaluation(seed: int, samples_per_level: int) -> list[Example]:
    """Fresh problems of the embedded task, so many of every level, none of them trained on.

    They depend on the seed too, so that seeds are independent replications.
    """
    return [
        _tiny(seed, index, "eval", level)
        for level in task.LEVELS
        for index in range(samples_per_level)
    ]


def _tiny(seed: int, index: int, split: str, level: str | None = None) -> Example:
    problem = task.make_problem(seed, index, split=split, level=level)
    return Example(problem.text, problem.answer, problem.level)


class TableSource:
    """A finite list of examples, endlessly: every epoch holds each once, in an order of its own.

    Batches tile the epochs without a gap, so the batch that ends one epoch may begin the next.

    Args:
      examples: at least one.
      seed: non-negative.
      report: see `Source`.
    """

    def __init__(self, examples: Sequence[Example], seed: int, report: str = ""):
        self.examples = tuple(examples)
        self.report = report
        self._seed = seed

    def train(self, step: int, batch_size: int) -> list[Example]:
        count = len(self.examples)
        first = (step - 1) * batch_size
        positions = range(first, first + batch_size)
        orders = {
            epoch: _order(count, self._seed, _TRAIN_STREAM, epoch)
            for epoch in {position // count for position in positions}
        }
        return [self.examples[orders[p // count][p % count]] for p in positions]


def _order(count: int, *entropy: int) -> np.ndarray:
    """A permutation of range(count) that depends on `count` and `entropy` alone.

    From raw bits, whose stream NumPy promises never to change; `Generator.permutation` may.
    """
    return np.argsort(np.random.PCG64(entropy).random_raw(count), kind="stable")


def open_source(
    source: str,
    seed: int,
    *,
    split: str = "",
    subset: str = "",
    problem_column: str = "",
    answer_column: str = "",
    level_column: str = "",
    accept: Accept | None = None,
    need_answers: bool = False,
) -> Source:
    """The source that the keys of `config.data` name.

    Args:
      source: "tiny", or a table: see opsdc_jax/data/tables.py.
      seed: of the order of the examples.
      split, subset: of a published data set; empty means "train" and the usual subset.
      problem_column, answer_column, level_column: names; empty means the usual ones, see
        opsdc_jax/data/columns.py.
      accept: why an example cannot be used, or None; refused ones are dropped and counted.
      need_answers: a row without an answer counts as bad.

    Raises:
      InputError: the source is unknown, cannot be read, or holds nothing usable.
    """
    if source == "tiny":
        given = (split, subset, problem_column, answer_column, level_column)
        if any(given):
            raise InputError(
                "data.source='tiny' has no splits and no columns: leave the other data keys empty"
            )
        return TinySource(seed)
    table = TableName(source, split=split, subset=subset)
    columns = Columns(problem_column, answer_column, level_column)
    examples, report = load(table, columns, accept=accept, need_answers=need_answers)
    return TableSource(examples, seed, str(report))


class Evaluation(NamedTuple):
    """Problems to evaluate on, and what was read and left out, for people."""

    examples: list[Example]
    report: str


def evaluation_examples(
    source: str,
    seed: int,
    *,
    limit: int = 0,
    split: str = "",
    subset: str = "",
    problem_column: str = "",
    answer_column: str = "",
    level_column: str = "",
    accept: Accept | None = None,
) -> Evaluation:
    """The problems of a benchmark, every one with an answer to grade with.

    Args:
      source: a table: see opsdc_jax/data/tables.py.
      seed: of the choice that `limit` makes.
      limit: at most so many problems, drawn at random; 0 means all, in their own order.
      split: empty means "test", or the one where a published benchmark has its problems.
      others: as in `open_source`.

    Raises:
      InputError: the table is unknown, cannot be read, or holds nothing usable.
    """
    default_split = _EVAL_SPLITS.get(source.partition("@")[0], "test")
    table = TableName(source, split, default_split, subset, section="eval")
    columns = Columns(problem_column, answer_column, level_column)
    examples, report = load(table, columns, accept=accept, need_answers=True)
    if not limit or limit >= len(examples):
        return Evaluation(examples, str(report))
    order = _order(len(examples), seed, _EVAL_STREAM)
    drawn = [examples[index] for index in order[:limit]]
    return Evaluation(drawn, f"{report}\ndrawn from these: {limit:,} (eval.limit)")


def levels(examples: Sequence[Example]) -> list[str]:
    """The difficulty levels that occur, in order of first appearance."""
    return list(dict.fromkeys(example.level for example in examples))
