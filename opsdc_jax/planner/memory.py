"""Memory by arithmetic: what shapes, dtypes and shardings say, without devices or a compiler."""

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from opsdc_jax import sharding
from opsdc_jax.distill import TrainState


def abstract_mesh(sizes: Mapping[str, int]) -> Any:
    """An `AbstractMesh`: enough to know every array's part, with devices that exist nowhere."""
    shape = tuple(sizes[axis] for axis in sharding.MESH_AXES)
    return AbstractMesh(shape, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def device_bytes(tree: Any) -> int:
    """Bytes that a tree of placed `ShapeDtypeStruct`s takes on each device.

    Leaves whose memory kind is the host's take none, nor do plain numbers among the arguments.
    """
    leaves = jax.tree.leaves(tree)
    return sum(_leaf_bytes(leaf) for leaf in leaves if isinstance(leaf, jax.ShapeDtypeStruct))


def _leaf_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    placed = leaf.sharding
    if placed is not None and placed.memory_kind in ("pinned_host", "unpinned_host"):
        return 0
    shape = leaf.shape if placed is None else placed.shard_shape(leaf.shape)
    return math.prod(shape) * _itemsize(leaf.dtype)


def _itemsize(dtype: Any) -> int:
    # A typed random key is 8 bytes; its dtype has no width of its own.
    return 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize


STATE = ("weights", "teacher", "optimizer")  # the names of `state_parts`


def state_parts(like: TrainState) -> dict[str, int]:
    """Bytes per device of what stays resident from step to step, by part.

    An anchor's base counts with the teacher: neither changes in an update.
    """
    return {
        "weights": device_bytes(like.student),
        "teacher": device_bytes((like.teacher, like.base)),
        "optimizer": device_bytes((like.optimizer, like.step)),
    }
