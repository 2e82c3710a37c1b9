"""What a run left in its folder, as far as it got: nothing but a folder of a run is required."""

import pathlib
import re
from typing import Any, NamedTuple

from opsdc_jax.config import InputError
from opsdc_jax.files import Fields, read_json, read_json_lines
from opsdc_jax.metrics import read_metrics
from opsdc_jax.results import (
    BASE,
    SystemFiles,
    benchmark_folders,
    check_summary,
    student_step,
    systems,
)
from opsdc_jax.summary import summarise
from opsdc_jax.workdir import read_config

_TOKENS = re.compile(r"tokens-(\d+)\.jsonl")
_PER_TOKEN = (
    *("tokens", "kl", "student_entropy", "teacher_entropy", "student_prob", "teacher_prob"),
    *("student_top", "teacher_top"),
)
_ROLLOUT: Fields = {"problem": str, "stopped": bool, **dict.fromkeys(_PER_TOKEN, list)}


class Responses(NamedTuple):
    """The two systems of a benchmark whose responses are shown, response by response.

    Attributes:
      benchmark: its name.
      base, student: files of the base model and of the newest student.
    """

    benchmark: str
    base: SystemFiles
    student: SystemFiles


class View(NamedTuple):
    """The compared rollouts of a step: what samples/tokens-STEP.jsonl holds."""

    step: int
    rollouts: list[dict[str, Any]]


class Run(NamedTuple):
    """A run, or an evaluation without training.

    Attributes:
      config: of the run; {} of an evaluation without training.
      metrics: rows of metrics.jsonl.
      benchmarks: as in eval/summary.json; of a run that goes on, as far as it is evaluated.
      responses: of the benchmarks for which base and student are graded.
      views: rollouts compared with the teacher, by step.
      finished: whether training and its last evaluation are done.
      notes: sentences on what is missing, for the reader.
    """

    path: pathlib.Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    benchmarks: dict[str, Any]
    responses: list[Responses]
    views: list[View]
    finished: bool
    notes: list[str]

    @property
    def last_step(self) -> int:
        """The last step that was done; 0 before the first."""
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def refreshes(self) -> list[int]:
        """The steps after which the teacher took the student's weights."""
        every = self.config["teacher"]["every"] if self.config else 0
        return list(range(every, self.last_step + 1, every)) if every else []


def read_run(path: pathlib.Path) -> Run:
    """Reads a workdir of scripts/train.py, or an --out folder of scripts/evaluate.py.

    Raises:
      InputError: the folder holds neither, or a damaged file.
    """
    config_file, summary_file = path / "config.json", path / "eval" / "summary.json"
    if not config_file.exists() and not summary_file.exists():
        raise InputError(f"{path} holds no run: give the --workdir of a run")
    config = read_config(path).to_dict() if config_file.exists() else {}
    finished = summary_file.exists()
    summary = read_json(summary_file) if finished else _so_far(path / "eval")
    if "benchmarks" in summary:
        check_summary(summary_file, summary)
    metrics = read_metrics(path / "metrics.jsonl")
    views = [
        View(int(found[1]), _rollouts(file))
        for file in sorted((path / "samples").glob("tokens-*.jsonl"))
        if (found := _TOKENS.fullmatch(file.name))
    ]
    notes = []
    if not finished:
        done, steps = metrics[-1]["step"] if metrics else 0, config["train"]["steps"]
        notes.append(f"This run has not finished: {done} of {steps} steps are done.")
    elif "benchmarks" not in summary:
        notes.append("The evaluation was written by an older version, whose files are not read.")
    elif not summary["benchmarks"]:
        notes.append("Nothing was evaluated: eval.source is none.")
    if config and not views:
        notes.append("No token was compared with the teacher: log.token_views is 0.")
    return Run(
        path=path,
        config=config,
        metrics=metrics,
        benchmarks=summary.get("benchmarks", {}),
        responses=_responses(path / "eval"),
        views=views,
        finished=finished,
        notes=notes,
    )


def _rollouts(file: pathlib.Path) -> list[dict[str, Any]]:
    """The compared rollouts of a step."""
    rollouts = list(read_json_lines(file, _ROLLOUT))
    for number, rollout in enumerate(rollouts, start=1):
        if len({len(rollout[name]) for name in _PER_TOKEN}) > 1:
            raise InputError(f"{file}:{number} is damaged: not every token has all its numbers")
    return rollouts


def _so_far(folder: pathlib.Path) -> dict[str, Any]:
    """The summary of an evaluation that goes on; {} while one of its systems is incomplete."""
    try:
        return summarise(folder)
    except InputError:
        return {}


def _responses(folder: pathlib.Path) -> list[Responses]:
    found = []
    for benchmark in benchmark_folders(folder):
        graded = {f.system: f for f in systems(benchmark) if f.grades.exists()}
        students = sorted((name for name in graded if name != BASE), key=_newest)
        if BASE in graded and students and _newest(students[-1]) >= 0:
            found.append(Responses(benchmark.name, graded[BASE], graded[students[-1]]))
    return found


def _newest(system: str) -> int:
    """Rank of a system among the students: by step; -1 for what is no student."""
    step = student_step(system)
    return 0 if system == "student" else -1 if step is None else step
