"""Orbax checkpoints of the whole train state: asynchronous, atomic, verified before they are used.

A checkpoint is good if every file in it is as its manifest says. The manifest is written in the
background, before Orbax gives the folder its final name: a save that is killed at any moment
leaves a folder with a temporary name, or a good checkpoint.
"""

import contextlib
import dataclasses
import importlib.metadata
import os
import pathlib
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp

from opsdc_jax import distributed, manifest, processes, sharding
from opsdc_jax.config import InputError, differing_keys
from opsdc_jax.distill import TrainState
from opsdc_jax.files import read_json, writing
from opsdc_jax.models.qwen3 import Params

_ITEMS = ("student", "teacher", "optimizer", "base")  # the last where the state has one
# Seconds of a save in the background, after which Orbax gives up. All hosts write 14 bytes a
# parameter between them (float32, AdamW's two moments, a bfloat16 teacher; 16 with a base); then
# the first reads all of it for the manifest: 0.5 TB of a 32B model at 100 MB/s take an hour and a
# half.
_LONGEST_SAVE = 4 * 3600
_UNFINISHED = re.compile(r"\d+\.orbax-checkpoint-tmp.*")


class Checkpointer:
    """Saves and restores `TrainState`s under a folder, one sub-folder a step.

    Student, teacher, optimizer and base are items of their own, so the student can be read without
    the rest. Random keys and data need no state: both are pure functions of (seed, step).
    Use as a context manager: leaving it waits for the last save.

    Args:
      keep: newest checkpoints kept.
      about: what each manifest says of the run, besides the step, the best one and `made_by`.

    Raises:
      InputError: the folder cannot be made.

    Attributes:
      best: a step whose checkpoint is kept besides the newest; 0: none.
    """

    def __init__(
        self, folder: str | pathlib.Path, keep: int, about: Mapping[str, Any] | None = None
    ):
        # Orbax logs with tracebacks what it also raises, which here becomes one sentence.
        absl.logging.set_verbosity(absl.logging.FATAL)
        self._folder = pathlib.Path(folder).absolute()
        self._policy = _NewestAndBest(keep)
        self._about = dict(about or {}) | {"made_by": _made_by()}
        self._saving: dict[str, Any] = {"step": 0}
        with writing(self._folder):
            self._manager = ocp.CheckpointManager(
                self._folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self._policy,
                    enable_async_checkpointing=True,
                    async_options=ocp.AsyncOptions(
                        timeout_secs=_LONGEST_SAVE,
                        post_finalization_callback=self._write_manifest,
                    ),
                    lightweight_initialize=True,  # reads no metadata, which may be damaged
                ),
            )
        self._saved_at = time.monotonic()
        self._saves, self._blocked_seconds = 0, 0.0

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        try:
            with self._blocking():
                self._manager.close()
        except Exception as closing:
            if error is None:
                raise
            if str(closing) != str(error):  # which is under way, and says what came first
                print(f"also: {closing}", file=sys.stderr)

    @property
    def best(self) -> int:
        return self._policy.best

    @best.setter
    def best(self, step: int) -> None:
        self._policy.best = step

    def save(self, state: TrainState, step: int) -> None:
        """Starts a save in the background; a step that is already saved is left alone.

        Raises:
          InputError: this save, or the one before, cannot be written.
        """
        if self._manager.latest_step() == step:
            return
        items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
        # A guard's stop saves where the loop allows no silent copies; Orbax makes them.
        with self._blocking(), jax.transfer_guard("allow"):
            self._manager.wait_until_finished()  # the save before has a manifest of its own
            self._saving = {"step": step, "best": self.best, **self._about}
            self._manager.save(step, args=ocp.args.Composite(**items))
        self._saved_at = time.monotonic()
        self._saves += 1

    def check(self) -> None:
        """Returns at once, whether a save is in progress or not.

        Raises:
          InputError: the last save has failed.
        """
        # Not by the manager's check_for_errors: the thread that deletes old checkpoints after the
        # save asks it too, and who asks first takes the error away from the other.
        if not self._manager.is_saving_in_progress():
            with self._blocking():
                self._manager.wait_until_finished()

    def overdue(self, minutes: float) -> bool:
        """Whether the last save is at least so long ago; called by all processes. 0: never."""
        waited = time.monotonic() - self._saved_at
        return minutes > 0 and distributed.any_process(waited >= 60 * minutes)

    def blocked(self, seconds: float) -> str:
        """In words, how long saves have kept the loop waiting, which took so many seconds."""
        waited = self._blocked_seconds
        return (
            f"{self._saves} checkpoints kept the loop waiting for {waited:.2f} of {seconds:.1f} s "
            f"({100 * waited / seconds:.1f}%)"
        )

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Restores a checkpoint to the shapes, dtypes and shardings of `like`."""
        items = self._restore(step, _items(like))
        restored_step = sharding.place(np.int32(step), like.step.sharding)
        return dataclasses.replace(like, step=restored_step, **items)

    def restore_student(self, step: int, like: Params) -> Params:
        """Restores the student's parameters alone.

        Args:
          like: tree of arrays, or of `jax.ShapeDtypeStruct`s with shardings.
        """
        return self._restore(step, {"student": like})["student"]

    def made_elsewhere(self, step: int) -> str:
        """What differs since a checkpoint was made, in words; empty where nothing does."""
        made_by = read_json(self._folder / str(step) / manifest.NAME)["made_by"]
        changed = "; ".join(differing_keys(_made_by(), made_by))
        return f" ({changed}: results are the same but for roundings)" if changed else ""

    def _restore(self, step: int, items: dict) -> dict:
        arguments = {
            name: ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, item))
            for name, item in items.items()
        }
        restored = self._manager.restore(step, args=ocp.args.Composite(**arguments))
        return {name: restored[name] for name in items}

    def _write_manifest(self) -> None:
        """Called by Orbax's thread of the first process, once all have written their parts."""
        (folder,) = self._folder.glob(f"{self._saving['step']}.orbax-checkpoint-tmp*")
        manifest.write(folder, self._saving)

    @contextlib.contextmanager
    def _blocking(self) -> Iterator[None]:
        """Counts the time, and says in one sentence why a save failed."""
        began = time.perf_counter()
        try:
            yield
        except Exception as error:
            # Of the array writer, a full disk is an error that ends with the system's number.
            code = re.search(r"os_error_code='(\d+)'", str(error))
            of_the_disk = isinstance(error, OSError | InputError) or code
            # Of several processes one may be gone: their errors are of the system's kind too.
            if not of_the_disk or isinstance(error, TimeoutError | ConnectionError):
                raise
            reason = os.strerror(int(code[1])) if code else getattr(error, "strerror", None)
            raise InputError(
                f"the checkpoint of step {self._saving['step']} cannot be written to "
                f"{self._folder} ({reason or error}): make room or give permission, then the same "
                "command continues from the one before"
            ) from error
        finally:
            self._blocked_seconds += time.perf_counter() - began


def _items(state: TrainState) -> dict[str, Any]:
    trees = {name: getattr(state, name) for name in _ITEMS}
    return {name: tree for name, tree in trees.items() if tree is not None}


@dataclasses.dataclass
class _NewestAndBest:
    """An Orbax preservation policy."""

    keep: int
    best: int = 0

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> list[bool]:
        """Which of the checkpoints, oldest first, stay."""
        oldest = len(checkpoints) - self.keep
        return [
            number >= oldest or info.step == self.best for number, info in enumerate(checkpoints)
        ]


def newest_good(folder: pathlib.Path) -> tuple[int, dict[int, str]]:
    """The newest step whose checkpoint is good, and what is wrong with later ones; only reads.

    Returns:
      the step, 0 if there is none, and reasons by step.

    Raises:
      InputError: a file cannot be read.
    """
    wrong: dict[int, str] = {}
    for step in sorted(manifest.steps(folder), reverse=True):
        reason = manifest.problem(folder / str(step))
        if reason is None:
            return step, wrong
        wrong[step] = reason
    return 0, wrong


def recover(folder: pathlib.Path) -> int:
    """The newest step with a good checkpoint, 0 if none was ever saved.

    What lies after it, and what a killed save has left, is removed: the run writes it again. Not
    to be called while a `Checkpointer` of this folder is open.

    Raises:
      InputError: checkpoints are there, but none is good; or one cannot be read or removed.
    """
    step, wrong = newest_good(folder)
    reasons = "; ".join(f"{later}: {reason}" for later, reason in wrong.items())
    if wrong and not step:
        raise InputError(
            f"no checkpoint in {folder} is whole ({reasons}): choose another --workdir, or remove "
            "that folder to train from the start"
        )
    for later, reason in wrong.items():
        print(f"the checkpoint of step {later} is damaged ({reason}): step {step} is used")
    found = list(folder.iterdir()) if folder.is_dir() else []
    leftovers = [path for path in found if _UNFINISHED.fullmatch(path.name)]
    for path in [*leftovers, *(folder / str(later) for later in wrong)]:
        try:
            path.unlink() if path.is_symlink() else shutil.rmtree(path)
        except OSError as error:
            raise InputError(f"{path} cannot be removed ({error.strerror})") from None
    return step


def _made_by() -> dict[str, Any]:
    """The versions and devices that decide how sums are rounded, for a checkpoint's manifest."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax")}
    return {
        **versions,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "cpu_threads": processes.cores(),
    }
