"""Grades of stored responses, and the statistics of a whole evaluation: no model is needed.

What is read and written is described in docs/formats.md.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from opsdc_jax import grading, measures, results, statistics
from opsdc_jax.config import InputError
from opsdc_jax.files import Fields, check_fields, read_json
from opsdc_jax.results import BASE, CONCISE, STUDENT, SystemFiles
from opsdc_jax.statistics import Graded

# Settings in which systems that stand side by side must not differ.
_SHARED: Fields = {
    **{"benchmark": str, "source": str, "problems": int, "fingerprint": str, "template": str},
    **{"samples": int, "max_response_tokens": int, "temperature": (int, float)},
    **{"top_p": (int, float), "top_k": int, "seed": int},
}
_MARKS: Fields = {  # what measuring the thought needs of the tokenizer
    **dict.fromkeys(("think_id", "end_think_id"), (int, type(None))),
    "thought_open": bool,
}
_PAIRS = ((CONCISE, BASE), (STUDENT, BASE), (STUDENT, CONCISE))
# Below this many problems fewer samples than that mean nothing: 30 problems of AIME, each solved
# half of the time, have a 95% interval of +-6 points at 8 samples from the sampling alone.
_FEW_PROBLEMS, _SAMPLES_OF_FEW = 100, 32
_MUCH_TRUNCATED = 0.02
_MUCH_UNPARSED = 0.05


def grade(files: SystemFiles) -> None:
    """Measures every stored response of a system and writes the grades.

    Raises:
      InputError: a file is missing or damaged.
    """
    settings = read_json(files.settings)
    check_fields(files.settings, settings, _MARKS)
    items: list[tuple[str, str, bool]] = []
    rows: list[dict[str, Any]] = []
    for response in files.rows():
        text = measures.with_its_thought(response["text"], settings["thought_open"])
        items.append((text, response["gold"], not response["stopped"]))
        rows.append(_measure(response, settings) | {"unparsed": _is_unparsed(response, text)})
    if not rows:
        raise InputError(f"{files.responses} is empty: finish the evaluation first")
    for row, graded in zip(rows, grading.grade_many(items), strict=True):
        row |= {"scores": graded.scores, "timed_out": graded.timed_out}
    # Of an evaluation that is not complete the responses lie as they ended.
    files.write_grades(sorted(rows, key=lambda row: (row["index"], row["sample"])))


def _measure(response: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is measured on a response besides its answer."""
    ids, stopped = response["ids"], response["stopped"]
    thinking = measures.thinking_tokens(
        ids,
        settings["think_id"],
        settings["end_think_id"],
        thought_open=settings["thought_open"],
    )
    return {
        "index": response["index"],
        "sample": response["sample"],
        "level": response["level"],
        "tokens": len(ids),
        "thinking_tokens": thinking,
        "answer_tokens": len(ids) - thinking,
        "truncated": not stopped,
        "repetitive": measures.is_repetitive(ids[: len(ids) - stopped]),
        "doubt_words": measures.doubt_words(response["text"]),
    }


def _is_unparsed(response: Mapping[str, Any], text: str) -> bool:
    return response["stopped"] and grading.committed_answer(text) is None


def headline(files: SystemFiles) -> str:
    """Accuracy and length of a graded system, in words."""
    accuracy, tokens = _means(files)
    return f"accuracy {100 * accuracy:.1f}%, {tokens:,.1f} tokens"


def _means(files: SystemFiles) -> tuple[float, float]:
    rows = files.read_grades()
    accuracy = sum(row["scores"][statistics.HEADLINE] for row in rows) / len(rows)
    return accuracy, sum(row["tokens"] for row in rows) / len(rows)


def best_student(folder: pathlib.Path) -> int:
    """The step of a run's best student so far, 0 where none was evaluated.

    The best has the highest accuracy, averaged over the benchmarks; of equals the one with the
    fewest tokens is better, then the later one.

    Args:
      folder: eval/ of the run. A student that misses a benchmark does not count.
    """
    benchmarks = results.benchmark_folders(folder)
    means: dict[int, list[tuple[float, float]]] = {}
    for files in (files for benchmark in benchmarks for files in results.systems(benchmark)):
        step = results.student_step(files.system)
        if step and files.grades.exists():
            means.setdefault(step, []).append(_means(files))
    ranks = [
        (*np.mean(values, axis=0) * (1, -1), step)
        for step, values in means.items()
        if len(values) == len(benchmarks)
    ]
    return max(ranks, default=(0.0, 0.0, 0))[2]


def regrade(path: pathlib.Path) -> list[SystemFiles]:
    """Grades stored responses again.

    Args:
      path: a `<system>.jsonl`, or a folder with any number of them at any depth.

    Returns:
      The systems that were graded.

    Raises:
      InputError: there is nothing to grade, or a file is damaged.
    """
    if path.is_dir():
        folders = sorted({found.parent for found in path.rglob("*.settings.json")})
        found = [files for folder in folders for files in results.systems(folder)]
        found = [files for files in found if files.responses.exists()]
    else:
        found = [SystemFiles(path.parent, path.name.removesuffix(".jsonl"))]
        if found[0].responses != path:
            raise InputError(f"{path} is no <system>.jsonl of an evaluation")
    if not found:
        raise InputError(f"{path} holds no responses: give a folder of an evaluation, or a file")
    for files in found:
        grade(files)
    return found


def summarise(folder: pathlib.Path) -> dict[str, Any]:
    """The contents of summary.json for an eval folder whose systems are all complete and graded.

    Raises:
      InputError: a system is incomplete, a file is damaged, or systems that stand side by side
        were sampled differently.
    """
    return {
        "benchmarks": {
            benchmark.name: _summarise_benchmark(benchmark)
            for benchmark in results.benchmark_folders(folder)
        }
    }


def _summarise_benchmark(folder: pathlib.Path) -> dict[str, Any]:
    files = {found.system: found for found in results.systems(folder)}
    settings = {name: read_json(found.settings) for name, found in files.items()}
    for name, found in files.items():
        check_fields(found.settings, settings[name], _SHARED)
    _refuse_differences(folder, settings)
    graded = {name: _read(found, settings[name]) for name, found in files.items()}
    by_step = {results.student_step(name): name for name in graded}
    students = {step: by_step[step] for step in sorted(step for step in by_step if step)}
    names = {name: name for name in (BASE, CONCISE, STUDENT) if name in graded}
    if students:
        names[STUDENT] = students[max(students)]
    systems = {name: graded[stored] for name, stored in names.items()}
    groups = _groups(systems)
    curve = {0: BASE, **students} if students else {}
    return {
        "settings": {key: next(iter(settings.values()))[key] for key in _SHARED},
        "systems": {
            name: {"settings": {k: v for k, v in settings[names[name]].items() if k not in _SHARED}}
            | _in_groups(groups, statistics.describe, system)
            for name, system in systems.items()
        },
        "comparisons": [
            {"system": name, "against": other}
            | _in_groups(groups, statistics.compare, systems[name], systems[other])
            for name, other in _PAIRS
            if name in systems and other in systems
        ],
        "curve": [
            {"step": step, "statistics": statistics.describe(graded[name])}
            for step, name in curve.items()
            if name in graded
        ],
        "warnings": warnings(systems, next(iter(settings.values()))["max_response_tokens"]),
    }


def _refuse_differences(folder: pathlib.Path, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Systems that were not sampled alike cannot stand side by side."""
    (first, shared), *others = settings.items()
    for name, other in others:
        changed = [
            f"{key}: {shared[key]} and {other[key]}" for key in _SHARED if shared[key] != other[key]
        ]
        if changed:
            raise InputError(
                f"{folder}: {first} and {name} were sampled differently ({'; '.join(changed)}): "
                "evaluate them into separate folders"
            )


def _read(files: SystemFiles, settings: Mapping[str, Any]) -> Graded:
    rows = files.read_grades()
    if len(rows) != settings["problems"] * settings["samples"]:
        raise InputError(
            f"{files.grades} holds {len(rows)} of {settings['problems']} * {settings['samples']} "
            "responses: finish the evaluation first"
        )
    return Graded.from_rows(rows, settings["samples"])


def _groups(systems: Mapping[str, Graded]) -> dict[str, dict[str, np.ndarray]]:
    """The two ways of grouping problems by difficulty: name -> group -> indices of problems."""
    return {
        "by_level": statistics.by_level(next(iter(systems.values()))),
        "by_base_pass_rate": statistics.by_pass_rate(systems[BASE]) if BASE in systems else {},
    }


def _in_groups(
    groups: Mapping[str, Mapping[str, np.ndarray]],
    statistic: Callable[..., dict[str, Any]],
    *systems: Graded,
) -> dict[str, Any]:
    """A statistic of systems on all problems, and on each group of them."""
    return {"overall": statistic(*systems)} | {
        grouping: {
            group: statistic(*(system.select(problems) for system in systems))
            for group, problems in members.items()
        }
        for grouping, members in groups.items()
    }


def warnings(systems: Mapping[str, Graded], budget: int) -> list[str]:
    """Sentences on what the numbers of these systems cannot carry.

    Args:
      budget: of a response, in tokens.
    """
    found = []
    problems, samples = next(iter(systems.values())).correct.shape
    if problems < _FEW_PROBLEMS and samples < _SAMPLES_OF_FEW:
        found.append(
            f"k = {samples} on {problems} problems is too little to tell systems apart: take at "
            f"least k = {_SAMPLES_OF_FEW} samples of each"
        )
    for name, graded in systems.items():
        truncated, unparsed, timed_out = (
            float(graded.flags[flag].mean()) for flag in ("truncated", "unparsed", "timed_out")
        )
        if truncated > _MUCH_TRUNCATED:
            found.append(
                f"{name}: the budget of {budget:,} tokens cut {100 * truncated:.1f}% of the "
                "responses, which count as wrong and as shorter than they are: raise it"
            )
        if np.quantile(graded.counts["tokens"], 0.9) >= budget:
            found.append(
                f"{name}: the budget of {budget:,} tokens is not above the 90th percentile of the "
                "lengths, so means and reductions of length say little"
            )
        if unparsed > _MUCH_UNPARSED:
            found.append(
                f"{name}: {100 * unparsed:.1f}% of the responses ended without an answer that "
                "could be read, which count as wrong: look at them before trusting the accuracy"
            )
        if timed_out:
            found.append(
                f"{name}: {100 * timed_out:.2f}% of the gradings ran into their time limit and "
                "count as wrong"
            )
    return found
