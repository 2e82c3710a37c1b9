"""The device mesh, the one table logical axis -> mesh axis, and the placement of batches.

The engine is GSPMD: arrays carry `NamedSharding`s and the compiler inserts the communication.
Mesh axes: `replica` (copies of the parameters, for slices joined by a slow network), `fsdp`
(parameters and batch rows are split), `tensor` (heads and feed-forward width are split).
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from opsdc_jax.config import InputError

MESH_AXES = ("replica", "fsdp", "tensor")
BATCH_AXES = ("replica", "fsdp")
RULES: Mapping[str, str | None] = {
    "layers": None,
    "vocab": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
}


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
    """A mesh over all devices.

    Args:
      sizes: size of each mesh axis; at most one may be -1, which takes the remaining devices.

    Raises:
      InputError: the product of the sizes is not the number of devices.
    """
    devices = jax.device_count()
    given = [sizes[axis] for axis in MESH_AXES]
    fixed = math.prod(size for size in given if size != -1)
    if given.count(-1) > 1 or any(size == 0 or size < -1 for size in given):
        raise InputError("mesh: sizes must be positive, and at most one may be -1 (the rest)")
    shape = tuple(devices // fixed if size == -1 else size for size in given)
    if math.prod(shape) != devices:
        wanted = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, given, strict=True))
        raise InputError(f"mesh ({wanted}) does not multiply to the {devices} devices present")
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def param_shardings(mesh: Mesh, logical_axes: Any, abstract: Any) -> Any:
    """A tree of `NamedSharding`s for a tree of parameters.

    Args:
      logical_axes: tree of tuples of logical axis names (`qwen3.logical_axes`).
      abstract: the same tree with shapes (`qwen3.abstract_params`).

    Raises:
      InputError: two axes of one parameter share a mesh axis, or a size does not divide.
    """

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct, names: tuple[str, ...]) -> Any:
        spec = tuple(RULES[name] for name in names)
        used = [axis for axis in spec if axis is not None]
        if len(used) != len(set(used)):
            raise InputError(f"{jax.tree_util.keystr(path)}: axes {names} collide in {spec}")
        for size, name, axis in zip(leaf.shape, names, spec, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                works = [n for n in range(1, size + 1) if size % n == 0 and n <= 1024]
                raise InputError(
                    f"{jax.tree_util.keystr(path)}: axis {name!r} of size {size} cannot be split "
                    f"over mesh.{axis}={mesh.shape[axis]}; sizes that work: {works}"
                )
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(place, abstract, logical_axes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over the batch axes, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def check_divides(mesh: Mesh, key: str, rows: int) -> None:
    """Refuses a batch size that the batch axes do not divide.

    Args:
      key: the configuration key that sets `rows`, for the message.
    """
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if rows % parts:
        raise InputError(
            f"{key}={rows} cannot be split over {parts} devices ({' x '.join(BATCH_AXES)}): "
            f"make it a multiple of {parts}"
        )
