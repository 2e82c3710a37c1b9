"""Qwen3 weights in safetensors files <-> the parameter tree, strict both ways.

One table, `tensor_table`, says which file tensor is which slice of which parameter; reading,
writing and the checks all follow it. Only safetensors and JSON are read: no pickle, no remote code.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from opsdc_jax.config import InputError
from opsdc_jax.files import check_regular, read_json, write_json
from opsdc_jax.models import qwen3
from opsdc_jax.models.layers import Qwen3Config
from opsdc_jax.models.qwen3 import Params

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}  # formats that run code when they are read
_PROBLEMS_SHOWN = 8
_FLOATS = {"F32", "F16", "BF16"}
SHARD_BYTES = 5 * 10**9  # the size transformers cuts at


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """One tensor of the file: where it goes, and the shape it has there.

    Attributes:
      path: keys of the parameter in the tree.
      layer: index on the stacked axis; None for parameters outside the layers.
      shape: in the file.
      inputs: leading axes of our kernel that are contracted. The file stores linear layers as
        [outputs, inputs], each side flattened to one axis; 0 for what is stored as we hold it.
    """

    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]
    inputs: int


def tensor_table(config: Qwen3Config) -> dict[str, FileTensor]:
    """Name in the file -> place in the parameter tree, for every tensor of the model."""
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    H, N, K = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    per_layer = {
        "input_layernorm": (("attention_norm", "scale"), (D,), 0),
        "self_attn.q_proj": (("attention", "query"), (H * K, D), 1),
        "self_attn.k_proj": (("attention", "key"), (N * K, D), 1),
        "self_attn.v_proj": (("attention", "value"), (N * K, D), 1),
        "self_attn.o_proj": (("attention", "out"), (D, H * K), 2),
        "self_attn.q_norm": (("attention", "query_norm", "scale"), (K,), 0),
        "self_attn.k_norm": (("attention", "key_norm", "scale"), (K,), 0),
        "post_attention_layernorm": (("mlp_norm", "scale"), (D,), 0),
        "mlp.gate_proj": (("mlp", "gate"), (F, D), 1),
        "mlp.up_proj": (("mlp", "up"), (F, D), 1),
        "mlp.down_proj": (("mlp", "down"), (D, F), 1),
    }
    table = {
        "model.embed_tokens.weight": FileTensor(("embedding",), None, (V, D), 0),
        "model.norm.weight": FileTensor(("final_norm", "scale"), None, (D,), 0),
    }
    if not config.tie_word_embeddings:
        table["lm_head.weight"] = FileTensor(("head",), None, (V, D), 0)
    for layer in range(config.num_hidden_layers):
        for name, (path, shape, inputs) in per_layer.items():
            table[f"model.layers.{layer}.{name}.weight"] = FileTensor(
                ("layers", *path), layer, shape, inputs
            )
    return table


def load_params(
    folder: str | pathlib.Path,
    config: Qwen3Config,
    *,
    shardings: Params | None = None,
    dtype: str = "float32",
) -> Params:
    """Reads all weights into device arrays, in the layout of `qwen3.init_params`.

    Tensor by tensor: the stacked arrays are allocated once and filled in place, layer by layer, so
    the host never holds more than the tensor at hand.

    Args:
      shardings: tree of shardings for the parameters; None keeps them on the default device.
      dtype: of the parameters, whatever the files hold (bf16, fp16, fp32).

    Raises:
      InputError: missing, unexpected, duplicate or misshapen tensors (each is named), before any
        of them is read; or damaged files.
    """
    folder = pathlib.Path(folder)
    table, files = tensor_table(config), check_files(folder, config)
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: device, qwen3.abstract_params(config))
    params = jax.tree.map(lambda leaf: leaf, qwen3.abstract_params(config))
    for name, value in _tensors(folder, files):
        if name not in table:  # the second copy of a tied head
            continue
        spec = table[name]
        target, placed = get_leaf(params, spec.path), get_leaf(shardings, spec.path)
        stacked = spec.layer is not None
        shape = target.shape[1:] if stacked else target.shape
        value = value.reshape(_rotated(shape, spec.inputs))
        raw = _put(value, _rotated_sharding(placed, len(shape), spec.inputs, stacked))
        if not stacked:
            leaf = _convert(raw, spec.inputs, dtype)
        else:
            if isinstance(target, jax.ShapeDtypeStruct):
                target = jnp.zeros(target.shape, dtype, device=placed)
            leaf = _fill(target, raw, spec.layer, spec.inputs)
        leaf.block_until_ready()  # or the queue would hold every tensor read so far
        _set_leaf(params, spec.path, leaf)
    return params


def save_params(
    folder: str | pathlib.Path,
    params: Params,
    config: Qwen3Config,
    *,
    dtype: str,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes model.safetensors, or numbered shards of at most `shard_bytes` and their index."""
    folder = pathlib.Path(folder)
    table, width = tensor_table(config), jnp.dtype(dtype).itemsize
    shards: list[list[str]] = [[]]
    total = size = 0
    for name, spec in table.items():
        nbytes = math.prod(spec.shape) * width
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + nbytes, total + nbytes
    weight_map: dict[str, str] = {}
    count = len(shards)
    for number, names in enumerate(shards, 1):
        file = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        tensors = {name: _file_tensor(params, table[name], dtype) for name in names}
        safetensors.numpy.save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if count > 1:
        metadata = {"total_size": total}
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})
    else:
        (folder / INDEX).unlink(missing_ok=True)  # of weights saved here before, in shards


def _file_tensor(params: Params, spec: FileTensor, dtype: str) -> np.ndarray:
    leaf = get_leaf(params, spec.path)
    value = np.asarray(leaf if spec.layer is None else leaf[spec.layer])
    value = value.transpose(_rotated(tuple(range(value.ndim)), spec.inputs))
    return np.ascontiguousarray(value.astype(jnp.dtype(dtype))).reshape(spec.shape)


def get_leaf(tree: Any, path: tuple[str, ...]) -> Any:
    """The leaf at a path of keys."""
    return functools.reduce(lambda node, key: node[key], path, tree)


def _set_leaf(tree: Any, path: tuple[str, ...], leaf: Any) -> None:
    get_leaf(tree, path[:-1])[path[-1]] = leaf


def _rotated(axes: tuple[Any, ...], inputs: int) -> tuple[Any, ...]:
    """Our order of a kernel's axes, inputs first, in the file's order, outputs first."""
    return (*axes[inputs:], *axes[:inputs])


def _rotated_sharding(sharding: Any, rank: int, inputs: int, stacked: bool) -> Any:
    """The sharding of a parameter, or of one layer of it, in the file's order of axes."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    axes = (*sharding.spec, *(None,) * (rank + stacked - len(sharding.spec)))[stacked:]
    return jax.sharding.NamedSharding(
        sharding.mesh, jax.sharding.PartitionSpec(*_rotated(axes, inputs))
    )


def _put(value: np.ndarray, sharding: Any) -> jax.Array:
    """A host array on the mesh: each device takes its own part, in the file's dtype."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


@functools.partial(jax.jit, static_argnames=("inputs", "dtype"))
def _convert(raw: jax.Array, inputs: int, dtype: str) -> jax.Array:
    """The file's order of axes to ours, and the cast: on the device, where both are cheap."""
    outputs = raw.ndim - inputs
    return jnp.transpose(raw, _rotated(tuple(range(raw.ndim)), outputs)).astype(dtype)


@functools.partial(jax.jit, static_argnames="inputs", donate_argnames="stack")
def _fill(stack: jax.Array, raw: jax.Array, layer: int, inputs: int) -> jax.Array:
    """Writes one layer into its place in the stack's own buffer."""
    value = _convert(raw, inputs, stack.dtype)
    return jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0)


def _files(folder: pathlib.Path) -> list[str]:
    """Names of the folder's safetensors files, in the index's order of names."""
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{folder / INDEX} has no weight_map: download the folder again")
        names = sorted(set(map(str, weight_map.values())))
        for name in names:
            if pathlib.PurePath(name).name != name:
                raise InputError(f"{folder / INDEX} names {name!r}, which lies outside the folder")
            if not name.endswith(".safetensors"):
                raise InputError(f"{folder / INDEX} names {name!r}, which is no .safetensors file")
        return names
    if (folder / SINGLE).exists():
        return [SINGLE]
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
    others = f", only {', '.join(pickles[:3])}, which is never read: convert it" if pickles else ""
    raise InputError(f"{folder} holds neither {SINGLE} nor {INDEX}{others}")


def check_files(folder: pathlib.Path, config: Qwen3Config) -> list[str]:
    """The names of a folder's safetensors files, their headers checked; reads no weights.

    Raises:
      InputError: missing, unexpected, duplicate or misshapen tensors (each is named), or damaged
        files.
    """
    files, table = _files(folder), tensor_table(config)
    problems: list[str] = []
    seen: dict[str, str] = {}
    for file in files:
        with _opened(folder / file) as reader:
            for name in reader.keys():  # noqa: SIM118 (not a mapping)
                if name in seen:
                    problems.append(f"duplicate tensor {name} in {seen[name]} and {file}")
                seen[name] = file
                spec, described = table.get(name), reader.get_slice(name)
                shape, kind = tuple(described.get_shape()), described.get_dtype()
                if spec is None:
                    # Some tied checkpoints store the head a second time.
                    if not (name == "lm_head.weight" and config.tie_word_embeddings):
                        problems.append(f"unexpected tensor {name}")
                elif shape != spec.shape:
                    problems.append(f"{name} has shape {shape}, config.json asks for {spec.shape}")
                elif kind not in _FLOATS:
                    problems.append(f"{name} is {kind}, supported are bf16, fp16 and fp32")
    problems += [f"missing tensor {name}" for name in table if name not in seen]
    if (folder / INDEX).exists():
        listed = read_json(folder / INDEX)["weight_map"]
        wrong = (name for name, file in listed.items() if seen.get(name, file) != file)
        problems += [f"{name} is not in {listed[name]}, where the index puts it" for name in wrong]
    if problems:
        shown = problems[:_PROBLEMS_SHOWN]
        more = f"; and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
        raise InputError(f"{folder}: " + "; ".join(shown) + more)
    return files


def _tensors(folder: pathlib.Path, files: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the files, one at a time."""
    for file in files:
        with _opened(folder / file) as reader:
            for name in reader.keys():  # noqa: SIM118 (not a mapping)
                yield name, reader.get_tensor(name)


def _opened(path: pathlib.Path) -> Any:
    check_regular(path)
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}): download the file again") from None
