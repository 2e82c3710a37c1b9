"""Benchmarks by name: the problems that systems are compared on."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from opsdc_jax import data
from opsdc_jax.config import InputError
from opsdc_jax.data import Example
from opsdc_jax.data.loading import Accept


class Known(NamedTuple):
    """Where a benchmark is published: a data set of the hub and its subset(s)."""

    source: str
    subset: str = ""


_MMLU_STEM = (  # the STEM subjects of Hendrycks et al. 2021 (arXiv 2009.03300)
    *("abstract_algebra", "astronomy", "college_biology", "college_chemistry"),
    *("college_computer_science", "college_mathematics", "college_physics", "computer_security"),
    *("conceptual_physics", "electrical_engineering", "elementary_mathematics"),
    *("high_school_biology", "high_school_chemistry", "high_school_computer_science"),
    *("high_school_mathematics", "high_school_physics", "high_school_statistics"),
    "machine_learning",
)
KNOWN: Mapping[str, Known] = {
    "math500": Known("HuggingFaceH4/MATH-500"),
    "aime24": Known("HuggingFaceH4/aime_2024"),
    "aime25": Known("yentinglin/aime_2025"),
    "gsm8k": Known("openai/gsm8k"),
    "mmlu": Known("cais/mmlu", ",".join(_MMLU_STEM)),
}
_LONGEST_NAME = 100  # of a folder; the report's figures add to it
TINY = "tiny"
"""The embedded task: fresh problems of every level."""


class Benchmark(NamedTuple):
    """Problems with their answers.

    Attributes:
      name: fit for a file name.
      source: where they come from.
      fingerprint: of the problems and their order; where it differs, so do they.
      report: what was read and left out, for people.
    """

    name: str
    source: str
    examples: list[Example]
    fingerprint: str
    report: str


def open_benchmarks(
    names: str,
    seed: int,
    *,
    limit: int = 0,
    samples_per_level: int = 0,
    table: Mapping[str, str] | None = None,
    accept: Accept | None = None,
) -> list[Benchmark]:
    """The benchmarks that `config.eval.source` names.

    Args:
      names: separated by commas: "tiny", a name in `KNOWN`, or a table (opsdc_jax/data/tables.py);
        "none" is no benchmark.
      seed: of the tiny task's problems and of the choice that `limit` makes.
      limit: at most so many problems of each, drawn at random; 0 means all.
      samples_per_level: fresh problems of each level (tiny).
      table: split, subset and columns of a table that is the only benchmark, see
        `data.evaluation_examples`; empty values count as not given.
      accept: why an example of a table cannot be used, or None; refused ones are dropped.

    Raises:
      InputError: a benchmark that is unknown, cannot be read, is given twice, or does not go with
        the other arguments.
    """
    wanted = [name.strip() for name in names.split(",")]
    if wanted == ["none"]:
        return []
    given = {key: value for key, value in (table or {}).items() if value}
    if given and (len(wanted) > 1 or wanted[0] in {TINY, *KNOWN}):
        raise InputError(
            f"eval.{next(iter(given))} describes one table: leave it empty for {names!r}, or give "
            "one table by its hub id or file"
        )
    opened: dict[str, Benchmark] = {}
    for name in wanted:
        if name == TINY:
            benchmark = _tiny(seed, samples_per_level, limit)
        else:
            source, subset = KNOWN.get(name, Known(name))
            options = given | ({"subset": subset} if subset else {})
            read = data.evaluation_examples(source, seed, limit=limit, accept=accept, **options)
            benchmark = Benchmark(
                name if name in KNOWN else _plain_name(name),
                source,
                read.examples,
                data.fingerprint(read.examples),
                read.report,
            )
        if benchmark.name in opened:
            raise InputError(
                f"eval.source={names!r} names two benchmarks that would both be called "
                f"{benchmark.name!r}: evaluate them one after the other"
            )
        opened[benchmark.name] = benchmark
    return list(opened.values())


def _tiny(seed: int, samples_per_level: int, limit: int) -> Benchmark:
    examples = data.tiny_evaluation(seed, samples_per_level)
    if limit and limit < len(examples):  # evenly, so that every level keeps its share
        examples = [examples[index * len(examples) // limit] for index in range(limit)]
    report = f"tiny: {len(examples):,} fresh problems of the embedded task"
    return Benchmark(TINY, TINY, examples, data.fingerprint(examples), report)


def _plain_name(source: str) -> str:
    """A name for a table's folder: the last part of its path or id, in plain characters only."""
    last = source.partition("@")[0].rstrip("/").rpartition("/")[2]
    stem = re.sub(r"\.(jsonl|json|parquet)$", "", last, flags=re.IGNORECASE)
    return re.sub(r"[^A-Za-z0-9._-]+", "_", stem)[:_LONGEST_NAME].strip("._") or "benchmark"
