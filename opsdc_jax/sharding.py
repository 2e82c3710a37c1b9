"""The device mesh, the two tables logical axis -> mesh axis, and the placement of host arrays.

The engine is GSPMD: arrays carry `NamedSharding`s and the compiler inserts the communication.
Mesh axes: `replica` (copies of the parameters, for slices joined by a slow network), `fsdp`
(parameters and batch rows are split), `tensor` (heads and feed-forward width are split).

Decoding reads every weight for every token, so weights split over rows' devices would have to be
gathered for every token. There the `fsdp` axis is cut in three (`make_decode_mesh`), in place:
`fsdp` (rows only), `split` (heads, as `tensor`) and `copies` (query heads that share a key/value
head, which is then held more than once).
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from opsdc_jax.config import InputError

Rules = Mapping[str, str | tuple[str, ...] | None]

MESH_AXES = ("replica", "fsdp", "tensor")
TRAIN_RULES: Rules = {
    "batch": ("replica", "fsdp"),
    "positions": "tensor",
    "layers": None,
    "vocab": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
}

DECODE_AXES = ("replica", "fsdp", "split", "copies", "tensor")
# `tensor` comes first: training splits by it already, so each part is only cut further, and the way
# from training's layout is all-to-alls. In another order the compiler gathers whole arrays.
DECODE_RULES: Rules = {
    "batch": ("replica", "fsdp"),
    "positions": None,
    "layers": None,
    "vocab": ("tensor", "split", "copies"),
    "embed": None,
    "heads": ("tensor", "split", "copies"),
    "kv_heads": ("tensor", "split"),
    "head_dim": None,
    "mlp": ("tensor", "split", "copies"),
}


def mesh_shape(sizes: Mapping[str, int], devices: int) -> tuple[int, ...]:
    """The size of each axis of `MESH_AXES`.

    Args:
      sizes: size of each mesh axis; at most one may be -1, which takes the remaining devices.

    Raises:
      InputError: the product of the sizes is not the number of devices.
    """
    given = [sizes[axis] for axis in MESH_AXES]
    fixed = math.prod(size for size in given if size != -1)
    if given.count(-1) > 1 or any(size == 0 or size < -1 for size in given):
        raise InputError("mesh: sizes must be positive, and at most one may be -1 (the rest)")
    shape = tuple(devices // fixed if size == -1 else size for size in given)
    if math.prod(shape) != devices:
        wanted = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, given, strict=True))
        raise InputError(f"mesh ({wanted}) does not multiply to the {devices} devices present")
    return shape


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
    """A mesh over all devices, of the shape that `mesh_shape` gives.

    Raises:
      InputError: no such mesh, or JAX finds no devices.
    """
    try:
        devices = jax.device_count()
    except RuntimeError as error:  # what JAX raises where JAX_PLATFORMS names what is not there
        reason = " ".join(str(error).split())[:400]
        raise InputError(f"JAX finds no devices, check JAX_PLATFORMS: {reason}") from error
    shape = mesh_shape(sizes, devices)
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def make_decode_mesh(mesh: Mesh, width: int, kv_heads: int) -> Mesh:
    """The devices of `mesh`, in their order, with axes for decoding.

    Args:
      mesh: of training.
      width: devices that each layer is split over (tensor x split x copies).
      kv_heads: of the model; beyond so many devices, each head is held by several.

    Raises:
      InputError: the mesh has no such part; the widths it has are named.
    """
    replica, fsdp, tensor = (mesh.shape[axis] for axis in MESH_AXES)

    def cut(width: int) -> tuple[int, ...]:
        split = math.gcd(width, kv_heads) // tensor
        return replica, fsdp * tensor // width, split, width // (split * tensor), tensor

    widths = decode_widths(mesh, kv_heads)
    if width not in widths:
        raise InputError(
            f"mesh.decode_tensor={width} cannot be cut out of fsdp={fsdp} x tensor={tensor} for a "
            f"model of {kv_heads} key/value heads; sizes that work: {widths}"
        )
    kinds = (AxisType.Auto,) * len(DECODE_AXES)
    if isinstance(mesh, AbstractMesh):  # of a plan, which has shapes and no devices
        return AbstractMesh(cut(width), DECODE_AXES, axis_types=kinds)
    return Mesh(mesh.devices.reshape(cut(width)), DECODE_AXES, axis_types=kinds)


def decode_widths(mesh: Mesh, kv_heads: int) -> list[int]:
    """The widths `make_decode_mesh` accepts: whole heads, or whole copies of all heads."""
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    widths = (tensor * part for part in range(1, fsdp + 1) if fsdp % part == 0)
    return [width for width in widths if kv_heads % width == 0 or width % kv_heads == 0]


def rules_of(mesh: Mesh) -> Rules:
    """The table that goes with a mesh: decoding's has more axes."""
    return DECODE_RULES if "split" in mesh.axis_names else TRAIN_RULES


def spec(rules: Rules, names: tuple[str | None, ...]) -> PartitionSpec:
    """The mesh axes of an array whose dimensions have these logical names; None is whole."""
    return PartitionSpec(*(rules[name] if name is not None else None for name in names))


def param_shardings(
    mesh: Mesh, logical_axes: Any, abstract: Any, rules: Rules = TRAIN_RULES
) -> Any:
    """A tree of `NamedSharding`s for a tree of parameters.

    Args:
      logical_axes: tree of tuples of logical axis names (`qwen3.logical_axes`).
      abstract: the same tree with shapes (`qwen3.abstract_params`).

    Raises:
      InputError: two axes of one parameter share a mesh axis, or a size does not divide.
    """

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct, names: tuple[str, ...]) -> Any:
        name_of = jax.tree_util.keystr(path)
        parts = spec(rules, names)
        used = [axis for part in parts for axis in _axes(part)]
        if len(used) != len(set(used)):
            raise InputError(f"{name_of}: axes {names} collide in {tuple(parts)}")
        for size, name, part in zip(leaf.shape, names, parts, strict=True):
            devices = math.prod(mesh.shape[axis] for axis in _axes(part))
            if size % devices:
                works = [n for n in range(1, min(size, 1024) + 1) if size % n == 0]
                raise InputError(
                    f"{name_of}: axis {name!r} of size {size} cannot be split over "
                    f"mesh.{' x '.join(_axes(part))}={devices}; sizes that work: {works}"
                )
        return NamedSharding(mesh, parts)

    return jax.tree_util.tree_map_with_path(place, abstract, logical_axes)


def _axes(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes one dimension is split over."""
    return (part,) if isinstance(part, str) else part or ()


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over the batch axes, everything else whole; for either kind of mesh."""
    return NamedSharding(mesh, spec(TRAIN_RULES, ("batch",)))


def between_layers(mesh: Mesh, positions: int) -> NamedSharding:
    """Of hidden states [B, T, D] where a layer ends: rows split, and positions if they divide.

    Said at every layer: left to itself, the compiler lets hidden states follow the embedding, which
    is split on D, and has every device compute all rows.
    """
    names = ("batch", "positions") if positions % mesh.shape["tensor"] == 0 else ("batch",)
    return NamedSharding(mesh, spec(rules_of(mesh), names))


def whole(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def place(tree: Any, sharding: Sharding) -> Any:
    """Arrays of this process on the mesh: each process copies only the parts of its own devices.

    Args:
      tree: numbers, numpy arrays or local arrays, the same in every process.
    """

    def put(leaf: Any) -> jax.Array:
        if not isinstance(leaf, jax.Array):
            leaf = np.asarray(leaf)
            leaf = leaf.astype(jax.dtypes.canonicalize_dtype(leaf.dtype))
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    with jax.transfer_guard_host_to_device("allow"):  # asked for
        return jax.tree.map(put, tree)


@contextlib.contextmanager
def explicit_transfers() -> Iterator[None]:
    """Makes a silent copy between host and device an error (`place`, `jax.device_get` are fine)."""
    with (
        jax.transfer_guard_host_to_device("disallow"),
        jax.transfer_guard_device_to_host("disallow"),
    ):
        yield


def check_divides(mesh: Mesh, key: str, rows: int) -> None:
    """Refuses a number of rows that the batch axes of a mesh do not divide.

    Args:
      key: the configuration key that sets `rows`, for the message.
    """
    axes = _axes(TRAIN_RULES["batch"])
    parts = math.prod(mesh.shape[axis] for axis in axes)
    if rows % parts:
        raise InputError(
            f"{key}={rows} cannot be split over {parts} devices ({' x '.join(axes)}): "
            f"make it a multiple of {parts}"
        )
