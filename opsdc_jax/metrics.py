"""metrics.jsonl, one object a step, its mirrors, and the count of compilations."""

import importlib.util
import json
import math
import pathlib
import secrets
from collections.abc import Sequence
from typing import Any, Protocol

import jax

from opsdc_jax.config import InputError
from opsdc_jax.files import check_fields, check_regular, write_json_lines, writing

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"


class Mirror(Protocol):
    """Another place that shows the rows of metrics.jsonl."""

    def write(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Every number of a row as a scalar of an event file, which TensorBoard draws over steps.

    Args:
      folder: of the event files; created if absent. Those of an earlier part of the run go: a kill
        leaves steps in them that are run again, and takes steps with it that were still buffered.
      rows: of the steps before, written again.
    """

    def __init__(self, folder: pathlib.Path, rows: Sequence[dict[str, Any]]):
        import tensorboardX

        for earlier in folder.glob("events.out.tfevents.*"):
            earlier.unlink()
        self._writer = tensorboardX.SummaryWriter(str(folder))
        for row in rows:
            self.write(row)

    def write(self, row: dict[str, Any]) -> None:
        for name in row.keys() - {"step"}:
            self._writer.add_scalar(name, row[name], row["step"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Every row as a step of a run on Weights & Biases; WANDB_* variables say where and how.

    Args:
      workdir: of the run, whose name it takes; wandb_id in it lets a resumed run continue there.
      config: the run's configuration, shown beside it.
    """

    def __init__(self, workdir: pathlib.Path, config: dict[str, Any]):
        import wandb

        id_file = workdir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(8), encoding="utf-8")
        self._run = wandb.init(
            project="opsdc_jax",
            name=workdir.resolve().name,
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(workdir),
            config=config,
        )

    def write(self, row: dict[str, Any]) -> None:
        self._run.log(row, step=row["step"])

    def close(self) -> None:
        self._run.finish()


def check_mirrors(log: Any) -> None:
    """Refuses mirrors whose package is not installed.

    Args:
      log: the `log` section of the run's configuration.

    Raises:
      InputError: naming what to install.
    """
    for key, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        if log[key] and importlib.util.find_spec(package) is None:
            raise InputError(
                f"log.{key}=True needs the package {package}, which is not installed: "
                f"pip install 'opsdc-jax[{key}]', or leave log.{key} at False"
            )


def open_mirrors(workdir: pathlib.Path, config: Any, last_step: int) -> list[Mirror]:
    """The mirrors that `config.log` switches on, for a run whose steps up to `last_step` stay.

    Raises:
      InputError: one cannot be written.
    """
    mirrors: list[Mirror] = []
    if config.log.tensorboard:
        rows = _rows_until(workdir / "metrics.jsonl", last_step)
        with writing(workdir / "tensorboard"):
            mirrors.append(TensorBoard(workdir / "tensorboard", rows))
    if config.log.wandb:
        mirrors.append(WeightsAndBiases(workdir, config.to_dict()))
    return mirrors


class MetricsFile:
    """Appends one JSON object a line.

    Args:
      path: the file; created if absent.
      last_step: lines of later steps are dropped first, since a resumed run writes them again.
      mirrors: get every row too; closed with the file.

    Raises:
      InputError: it cannot be written, now or later.
    """

    def __init__(self, path: pathlib.Path, last_step: int, mirrors: Sequence[Mirror] = ()):
        self._path, self._mirrors = path, mirrors
        kept = _rows_until(path, last_step)
        missing = set(range(1, last_step + 1)) - {row["step"] for row in kept}
        if missing:
            print(f"{path} is damaged: it lacks {len(missing)} steps, the first is {min(missing)}")
        # Replaced in one go: a crash here must not cost the history.
        write_json_lines(path, map(_finite, kept))
        with writing(path):
            self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        with writing(self._path):
            self._file.write(json.dumps(_finite(row), allow_nan=False) + "\n")
            self._file.flush()
            for mirror in self._mirrors:
                mirror.write(row)

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *exception: object) -> None:
        with writing(self._path):  # after a failed write, closing tries once more
            self._file.close()
            for mirror in self._mirrors:
                mirror.close()


def _rows_until(path: pathlib.Path, last_step: int) -> list[dict[str, Any]]:
    return [row for row in read_metrics(path) if row["step"] <= last_step]


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """A row as JSON can hold it, which has no NaN and no infinity: None stands for them."""
    return {name: value if math.isfinite(value) else None for name, value in row.items()}


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; none if it does not exist. A torn last line is dropped.

    A value that was not finite is NaN.

    Raises:
      InputError: another line is damaged, comes twice or too late, or the file cannot be read.
    """
    if not path.exists():
        return []
    check_regular(path)
    try:
        whole, _, _ = path.read_bytes().rpartition(b"\n")  # what follows was torn by a crash
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number} does not hold a JSON object: remove this line")
        check_fields(f"{path}:{number}", row, {"step": int})
        for name, value in row.items():
            if type(value) not in (int, float, type(None)):  # a bool is no number here
                raise InputError(
                    f"{path}:{number} holds {name!r} of type {type(value).__name__}, not a number: "
                    "remove this line"
                )
        if rows and row["step"] <= rows[-1]["step"]:
            raise InputError(
                f"{path}:{number} is of step {row['step']}, after step {rows[-1]['step']}: remove "
                "the line that is wrong"
            )
        rows.append({name: math.nan if value is None else value for name, value in row.items()})
    return rows


class _Compilations:
    """All compilations of this process since the first counter was made."""

    count = 0
    cached = 0
    seconds = 0.0
    listening = False

    @classmethod
    def listen(cls) -> None:
        if not cls.listening:  # listeners cannot be taken back, so there is one for the process
            cls.listening = True
            jax.monitoring.register_event_duration_secs_listener(cls._hear_duration)
            jax.monitoring.register_event_listener(cls._hear)

    @classmethod
    def _hear(cls, event: str, **_: Any) -> None:
        cls.cached += event == _CACHE_HIT_EVENT

    @classmethod
    def _hear_duration(cls, event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILE_EVENT:
            cls.count += 1
            cls.seconds += duration_secs


class CompileCounter:
    """XLA compilations of this process from the counter's creation on.

    A program read from the cache on disk counts as one, since the run waits for it too.
    """

    def __init__(self) -> None:
        _Compilations.listen()
        self._count, self._seconds = _Compilations.count, _Compilations.seconds
        self._cached = _Compilations.cached

    def __str__(self) -> str:
        cached = _Compilations.cached - self._cached
        return f"compiled {self.count} programs in {self.seconds:.1f} s ({cached} from the cache)"

    @property
    def count(self) -> int:
        return _Compilations.count - self._count

    @property
    def seconds(self) -> float:
        return _Compilations.seconds - self._seconds
