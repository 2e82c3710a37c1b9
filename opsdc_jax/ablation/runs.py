"""Runs of variants: each scripts/train.py in a process of its own, with its output in a file."""

import dataclasses
import json
import pathlib
import shlex
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence

from ml_collections import ConfigDict

from opsdc_jax import config, processes
from opsdc_jax.ablation.suites import DEFAULT, Overrides, applied, run_name
from opsdc_jax.config import InputError
from opsdc_jax.files import read_json_lines, writing
from opsdc_jax.workdir import Workdir, is_finished

_POLL = 0.2  # seconds between two looks at the processes


@dataclasses.dataclass(frozen=True)
class Run:
    """A variant with a seed.

    Attributes:
      name: of the variant's runs.
      settings: its whole configuration.
      folder: its workdir; its log lies beside it.
    """

    name: str
    seed: int
    settings: ConfigDict
    folder: pathlib.Path

    @property
    def log(self) -> pathlib.Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def finished(self) -> bool:
        return is_finished(self.folder)

    def arguments(self, file: ConfigDict) -> list[str]:
        """Of scripts/train.py, besides --config.

        Args:
          file: what the configuration file configures; the rest are overrides.
        """
        of_seed = sorted(self.folder.parent.glob(f"*-seed{self.seed}/eval"))
        # Responses of the base model are the same in all of them.
        others = [folder.parent for folder in of_seed if folder.parent != self.folder]
        reuse = {"eval.reuse": str(others[0])} if others else {}
        changed = overrides(file, applied(self.settings, reuse))
        return [*changed, "--workdir", str(self.folder)]


def overrides(file: ConfigDict, settings: ConfigDict) -> list[str]:
    """Arguments that make these settings of what a configuration file configures."""
    known, ours = config.flatten(file), config.flatten(settings)
    return [f"--config.{key}={ours[key]}" for key in ours if ours[key] != known[key]]


def planned(
    base: ConfigDict, variants: Iterable[Overrides], seeds: int, out: pathlib.Path
) -> list[Run]:
    """The runs of variants, each once, those first whose evaluations others take over.

    Raises:
      InputError: a configuration cannot be, or a folder holds a run of another one.
    """
    found: dict[pathlib.Path, Run] = {}
    for overrides in variants:
        name = run_name(base, overrides)
        for seed in range(base.seed, base.seed + seeds):
            settings = applied(base, overrides)
            settings.seed = seed
            try:
                config.validate(settings)
            except InputError as error:
                raise InputError(f"the variant {name} cannot run: {error}") from None
            folder = out / f"{name}-seed{seed}"
            Workdir(folder, settings)
            found.setdefault(folder, Run(name, seed, settings, folder))
    return sorted(found.values(), key=lambda run: run.name != DEFAULT)


def run_all(
    runs: Sequence[Run], train: Sequence[str], file: ConfigDict, jobs: int, record: pathlib.Path
) -> Iterator[tuple[Run, int, float]]:
    """Makes the runs that are not finished, `jobs` at a time; yields each as it ends.

    Where it is left early, by Ctrl-C or an error, the processes under way are asked to stop.

    Args:
      train: the command of every run, up to its arguments.
      file: as in `Run.arguments`.
      record: to which a line is added for each process: its run, exit code and seconds.

    Yields:
      (run, exit code, seconds).
    """
    waiting = [run for run in runs if not run.finished]
    free = processes.shares(jobs)
    active: list[tuple[Run, subprocess.Popen, set[int] | None, float]] = []
    try:
        while waiting or active:
            while waiting and free:
                run, share = waiting.pop(0), free.pop(0)
                command = [*train, *run.arguments(file)]
                with writing(run.log), run.log.open("a", encoding="utf-8") as log:
                    log.write(f"$ {shlex.join(command)}\n")
                process = processes.start(command, run.log, share)
                active.append((run, process, share, time.monotonic()))
            time.sleep(_POLL)
            for job in [job for job in active if job[1].poll() is not None]:
                run, process, share, began = job
                active.remove(job)
                free.append(share)
                yield run, process.returncode, _note(record, run, process.returncode, began)
    finally:
        _stop([process for _, process, _, _ in active])
        for run, process, _, began in active:
            _note(record, run, process.returncode, began)


def _note(record: pathlib.Path, run: Run, code: int, began: float) -> float:
    """Adds a line about a process that ended; returns its seconds."""
    seconds = round(time.monotonic() - began, 1)
    row = {"run": run.folder.name, "exit_code": code, "seconds": seconds}
    with writing(record), record.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")
    return seconds


def _stop(active: Sequence[subprocess.Popen]) -> None:
    """Asks processes to stop and waits, for a step and a checkpoint; a second Ctrl-C ends them."""
    try:
        for process in active:
            process.terminate()
        for process in active:
            process.wait()
    except KeyboardInterrupt:
        for process in active:
            process.kill()
            process.wait()


def recorded_seconds(record: pathlib.Path) -> dict[str, float]:
    """Seconds of each run, over all processes that worked on it."""
    found: dict[str, float] = {}
    if record.exists():
        for row in read_json_lines(record, {"run": str, "seconds": (int, float)}):
            found[row["run"]] = found.get(row["run"], 0.0) + row["seconds"]
    return found
