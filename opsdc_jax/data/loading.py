"""Rows -> the examples that can be used, and a report of what became of every row."""

import collections
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from opsdc_jax.config import InputError
from opsdc_jax.data.columns import BadRowError, Columns, Example, to_example
from opsdc_jax.data.tables import TableName, read_rows
from opsdc_jax.prompts import CONTROL_TOKEN

Accept = Callable[[Example], str | None]
"""Why the caller cannot use an example, or None if it can."""

_BAD_ROWS_SHOWN = 5


@dataclass
class Report:
    """What became of the rows of a table: rows = kept + bad + duplicates + dropped.

    Attributes:
      bad: rows that hold no usable problem; the first few, as "FILE:LINE: reason", in `bad_rows`.
      duplicates: rows whose problem had been seen; `conflicts` of them have another answer.
      dropped: how many examples the caller refused, by reason.
      fingerprint: of all kept examples in their order; where it differs, so do the data.
    """

    table: TableName
    rows: int = 0
    kept: int = 0
    bad: int = 0
    bad_rows: list[str] = field(default_factory=list)
    duplicates: int = 0
    conflicts: int = 0
    dropped: collections.Counter[str] = field(default_factory=collections.Counter)
    fingerprint: str = ""

    def __str__(self) -> str:
        lines = [
            f"{self.table}: {self.kept:,} of {self.rows:,} rows kept, "
            f"fingerprint {self.fingerprint}"
        ]
        if self.duplicates:
            lines.append(
                f"repeated problems: {self.duplicates:,} rows, {self.conflicts:,} with another "
                "answer; the first row counts"
            )
        lines += [f"dropped {count:,}: {reason}" for reason, count in self.dropped.items()]
        if self.bad:
            lines.append(f"bad rows: {self.bad:,}")
            lines += [f"  {row}" for row in self.bad_rows]
            if self.bad > len(self.bad_rows):
                lines.append(f"  and {self.bad - len(self.bad_rows):,} more")
        return "\n".join(lines)


def load(
    table: TableName, columns: Columns, *, accept: Accept | None = None, need_answers: bool = False
) -> tuple[list[Example], Report]:
    """All usable examples of a table, every problem once, in the order of the rows.

    Args:
      accept: judges an example once it is known to be new.
      need_answers: a row without an answer counts as bad.

    Raises:
      InputError: the table cannot be read, or nothing of it can be used.
    """
    report = Report(table)
    examples: list[Example] = []
    answers: dict[str, str] = {}  # of every problem seen
    for place, row in read_rows(table):
        report.rows += 1
        try:
            example = to_example(row, columns)
            if need_answers and not example.answer:
                raise BadRowError("has no answer to grade with")
        except BadRowError as error:
            report.bad += 1
            if len(report.bad_rows) < _BAD_ROWS_SHOWN:
                report.bad_rows.append(f"{place}: {error}")
            continue
        if example.problem in answers:
            report.duplicates += 1
            # No answer contradicts none.
            report.conflicts += len({answers[example.problem], example.answer, ""}) == 3
            continue
        answers[example.problem] = example.answer
        reason = accept(example) if accept else None
        if reason:
            report.dropped[reason] += 1
        else:
            examples.append(example)
    report.kept = len(examples)
    report.fingerprint = fingerprint(examples)
    _refuse_nothing(report)
    return examples, report


def fingerprint(examples: Sequence[Example]) -> str:
    """A digest of examples and their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update("\0".join((*example, "")).encode())
    return digest.hexdigest()[:12]


def _refuse_nothing(report: Report) -> None:
    """Raises InputError with the likeliest cause if no example is left."""
    if report.kept:
        return
    if not report.rows:
        raise InputError(f"{report.table} has no rows: give a table that holds problems")
    if report.dropped:
        reasons = "; ".join(f"{count:,}: {reason}" for reason, count in report.dropped.items())
        advice = (
            "raise sampler.max_prompt_tokens or " if report.dropped.keys() - {CONTROL_TOKEN} else ""
        )
        raise InputError(
            f"{report.table}: every problem was dropped ({reasons}): {advice}give other data"
        )
    section = report.table.section
    raise InputError(
        f"{report.table}: none of {report.rows:,} rows can be used ({report.bad_rows[0]}): name "
        f"the columns in {section}.problem_column and {section}.answer_column, or give other data"
    )
