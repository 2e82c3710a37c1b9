"""Orbax checkpoints of the whole train state: asynchronous, atomic, the newest few kept."""

import dataclasses
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from opsdc_jax import sharding
from opsdc_jax.distill import TrainState
from opsdc_jax.models.qwen3 import Params

_ITEMS = ("student", "teacher", "optimizer")


class Checkpointer:
    """Saves and restores `TrainState`s under a folder, one sub-folder a step.

    Student, teacher and optimizer are items of their own, so the student can be read without the
    rest. Random keys and data need no state: both are pure functions of (seed, step).
    Use as a context manager: leaving it waits for the last save.

    Args:
      keep: newest checkpoints kept.
    """

    def __init__(self, folder: str | pathlib.Path, keep: int):
        self._manager = ocp.CheckpointManager(
            pathlib.Path(folder).absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(keep),
                enable_async_checkpointing=True,
            ),
        )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    def save(self, state: TrainState, step: int) -> None:
        """Starts a save in the background; a step that is already saved is left alone."""
        if self._manager.latest_step() != step:
            items = {name: ocp.args.StandardSave(getattr(state, name)) for name in _ITEMS}
            self._manager.save(step, args=ocp.args.Composite(**items))

    def latest_step(self) -> int | None:
        """The newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Restores a checkpoint to the shapes, dtypes and shardings of `like`."""
        items = self._restore(step, {name: getattr(like, name) for name in _ITEMS})
        restored_step = sharding.place(np.int32(step), like.step.sharding)
        return dataclasses.replace(like, step=restored_step, **items)

    def restore_student(self, step: int, like: Params) -> Params:
        """Restores the student's parameters alone.

        Args:
          like: tree of arrays, or of `jax.ShapeDtypeStruct`s with shardings.
        """
        return self._restore(step, {"student": like})["student"]

    def _restore(self, step: int, items: dict) -> dict:
        arguments = {
            name: ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, item))
            for name, item in items.items()
        }
        restored = self._manager.restore(step, args=ocp.args.Composite(**arguments))
        return {name: restored[name] for name in items}
