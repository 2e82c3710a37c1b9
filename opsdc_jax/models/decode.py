"""Qwen3 one token at a time: what decoding does otherwise than `qwen3.forward`, and its weights.

A decode step multiplies every weight by few rows, so reading the weights is what it costs. They are
laid out for it once a call: each layer's for itself, outputs first, keys and values side by side,
gate and up too. Activations have the rows last, since XLA's matrix product on a CPU reads [outputs,
inputs] x [inputs, rows] up to twice as fast as [rows, inputs] x [inputs, outputs]
(docs/performance.md).

Shapes: B rows, S cache slots, D model width, H query heads, N key/value heads, G = H / N, K head
width, F feed-forward width, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from opsdc_jax import sharding
from opsdc_jax.models import attention, qwen3
from opsdc_jax.models.layers import COLUMNS, KVCache, Qwen3Config, rms_norm
from opsdc_jax.models.qwen3 import Params
from opsdc_jax.models.rope import apply_rotary, rotary_tables


class DecodeLayer(NamedTuple):
    """One layer's weights in compute dtype, laid out for decoding.

    Side by side lie what may be split over a mesh alike: keys and values, gate and up.
    """

    attention_norm_D: jax.Array
    query_HxKxD: jax.Array
    key_value_2xNxKxD: jax.Array
    query_norm_K: jax.Array
    key_norm_K: jax.Array
    out_DxHxK: jax.Array
    mlp_norm_D: jax.Array
    gate_up_2xFxD: jax.Array
    down_DxF: jax.Array


# Logical axes of a layer's arrays, by field.
_AXES: Mapping[str, tuple[str | None, ...]] = {
    "attention_norm_D": ("embed",),
    "query_HxKxD": ("heads", "head_dim", "embed"),
    "key_value_2xNxKxD": (None, "kv_heads", "head_dim", "embed"),
    "query_norm_K": ("head_dim",),
    "key_norm_K": ("head_dim",),
    "out_DxHxK": ("embed", "heads", "head_dim"),
    "mlp_norm_D": ("embed",),
    "gate_up_2xFxD": (None, "mlp", "embed"),
    "down_DxF": ("embed", "mlp"),
}


class Weights(NamedTuple):
    """What a token reads: the parameters in compute dtype and decoding's layout.

    Attributes:
      params: those outside of the layers.
      layers: one for each, in their order.
    """

    params: Params
    layers: list[DecodeLayer]


def for_decoding(params: Params, config: Qwen3Config, mesh: Mesh) -> Params:
    """Parameters, all or some, in compute dtype and split over the mesh as in decoding.

    In two moves: first the heads (and feed-forward width, and vocabulary) are split as they will
    be, by all-to-alls, then `embed` is gathered. Asked for both at once, the compiler gathers every
    parameter whole on every device.
    """
    params = jax.tree.map(lambda leaf: leaf.astype(config.compute_dtype), params)
    for rules in ({**sharding.DECODE_RULES, "embed": "fsdp"}, sharding.DECODE_RULES):
        placed = qwen3.shardings(config, mesh, rules)
        placed = {name: placed[name] for name in params}
        params = jax.lax.with_sharding_constraint(params, placed)
    return params


def unstack_layers(params: Params, config: Qwen3Config) -> list[DecodeLayer]:
    """Each layer's parameters as leaves of their own: one read out of the stack is copied first.

    Those that lie side by side are stacked before they are transposed: stacking transposes takes
    XLA on a CPU three times as long.
    """
    dtype = jnp.dtype(config.compute_dtype)

    def layer(i: int) -> DecodeLayer:
        weights = jax.tree.map(lambda leaf: leaf[i].astype(dtype), params["layers"])
        attend, mlp = weights["attention"], weights["mlp"]
        key_value_2xDxNxK = jnp.stack([attend["key"], attend["value"]])
        return DecodeLayer(
            attention_norm_D=weights["attention_norm"]["scale"],
            query_HxKxD=jnp.moveaxis(attend["query"], 0, -1),
            key_value_2xNxKxD=jnp.moveaxis(key_value_2xDxNxK, 1, -1),
            query_norm_K=attend["query_norm"]["scale"],
            key_norm_K=attend["key_norm"]["scale"],
            out_DxHxK=jnp.moveaxis(attend["out"], -1, 0),
            mlp_norm_D=weights["mlp_norm"]["scale"],
            gate_up_2xFxD=jnp.swapaxes(jnp.stack([mlp["gate"], mlp["up"]]), 1, 2),
            down_DxF=mlp["down"].T,
        )

    return [layer(i) for i in range(jax.tree.leaves(params["layers"])[0].shape[0])]


def as_trained(layer: DecodeLayer) -> Params:
    """One layer's parameters as in `qwen3.init_params`, without the leading axis.

    Every transpose is of two dimensions: such a one XLA on a CPU leaves to the product that reads
    it, any other it carries out first.
    """
    H, K, D = layer.query_HxKxD.shape
    N = layer.key_value_2xNxKxD.shape[1]
    key_NxKxD, value_NxKxD = layer.key_value_2xNxKxD
    gate_FxD, up_FxD = layer.gate_up_2xFxD
    return {
        "attention_norm": {"scale": layer.attention_norm_D},
        "attention": {
            "query": layer.query_HxKxD.reshape(H * K, D).T.reshape(D, H, K),
            "key": key_NxKxD.reshape(N * K, D).T.reshape(D, N, K),
            "value": value_NxKxD.reshape(N * K, D).T.reshape(D, N, K),
            "out": layer.out_DxHxK.reshape(D, H * K).T.reshape(H, K, D),
            "query_norm": {"scale": layer.query_norm_K},
            "key_norm": {"scale": layer.key_norm_K},
        },
        "mlp_norm": {"scale": layer.mlp_norm_D},
        "mlp": {"gate": gate_FxD.T, "up": up_FxD.T, "down": layer.down_DxF.T},
    }


def prepare(params: Params, config: Qwen3Config, mesh: Mesh) -> Weights:
    """The weights of a call, made once, a layer at a time: no stack in compute dtype exists.

    Parameters outside of the layers are the given arrays, if these have the dtype and the layout.
    """
    places = qwen3.shardings(config, mesh, sharding.DECODE_RULES)
    rest = outside_layers(params)
    ready = jax.tree.map(
        lambda leaf, place: (
            isinstance(leaf, jax.Array)
            and leaf.dtype == config.compute_dtype
            and leaf.sharding.is_equivalent_to(place, leaf.ndim)
        ),
        rest,
        outside_layers(places),
    )
    if not all(jax.tree.leaves(ready)):
        rest = _for_decoding(rest, config, mesh)
    numbers = sharding.place(list(range(config.num_hidden_layers)), sharding.whole(mesh))
    return Weights(rest, [lay_out_layer(params["layers"], config, mesh, i) for i in numbers])


def layer_for_decoding(
    layers: Params, config: Qwen3Config, mesh: Mesh, number: jax.Array | int
) -> DecodeLayer:
    """One layer out of `params["layers"]`, the stack of all."""
    one = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, number, 1), layers)
    (layer,) = unstack_layers(for_decoding({"layers": one}, config, mesh), config)
    return jax.lax.with_sharding_constraint(layer, layer_placements(mesh))


def layer_placements(mesh: Mesh) -> Any:
    """A `DecodeLayer` with a `NamedSharding` for each array."""
    placed: Any = {
        name: NamedSharding(mesh, sharding.spec(sharding.DECODE_RULES, axes))
        for name, axes in _AXES.items()
    }
    return DecodeLayer(**placed)


_for_decoding = jax.jit(for_decoding, static_argnames=("config", "mesh"))
lay_out_layer = jax.jit(layer_for_decoding, static_argnames=("config", "mesh"))


def outside_layers(params: Params) -> Params:
    """The parameters that belong to no layer."""
    return {name: leaf for name, leaf in params.items() if name != "layers"}


def token_tables(config: Qwen3Config, position_B: jax.Array) -> tuple[jax.Array, ...]:
    """`rotary_tables` of one token in each row, at its position."""
    return rotary_tables(position_B[:, None], config.head_dim, config.rope_theta, config.yarn)


def decode_step(
    params: Params,
    layers: list[DecodeLayer],
    config: Qwen3Config,
    token_B: jax.Array,
    rotary: tuple[jax.Array, ...],
    caches: list[KVCache],
    slot: jax.Array,
    valid_BxS: jax.Array,
) -> tuple[jax.Array, list[KVCache]]:
    """One token of every sequence through all layers.

    Args:
      params, layers: of `Weights`.
      rotary: `token_tables` of the new token's position in each row. Formed outside of the step:
        within, XLA on a CPU would form them again for every head of every layer.
      caches: one `KVCache` of S slots per layer.
      slot: index at which the new keys and values are written, the same for all rows.
      valid_BxS: slots the new token may attend to, its own included.

    Returns:
      hidden states [B, D] after the final norm, and the updated caches.
    """
    epsilon = config.rms_norm_eps
    x_DxB = params["embedding"][token_B].astype(config.compute_dtype).T

    def norm(x_DxB: jax.Array, scale_D: jax.Array) -> jax.Array:
        return rms_norm(x_DxB, scale_D[:, None], epsilon, axis=0)

    updated = []
    for layer, old in zip(layers, caches, strict=True):
        normed_DxB = norm(x_DxB, layer.attention_norm_D)
        query_BxHx1xK, cache = _project(layer, normed_DxB, rotary, epsilon, old, slot)
        attended_BxHxK = _attend(query_BxHx1xK, cache, valid_BxS)
        both = (1, 2), (1, 2)
        x_DxB = x_DxB + jnp.tensordot(layer.out_DxHxK, attended_BxHxK, axes=both)
        gate_FxB, up_FxB = jnp.tensordot(layer.gate_up_2xFxD, norm(x_DxB, layer.mlp_norm_D), axes=1)
        x_DxB = x_DxB + layer.down_DxF @ (jax.nn.silu(gate_FxB) * up_FxB)
        updated.append(cache)
    scale_D = params["final_norm"]["scale"].astype(x_DxB.dtype)
    return norm(x_DxB, scale_D).T, updated


def _project(
    layer: DecodeLayer,
    normed_DxB: jax.Array,
    rotary: tuple[jax.Array, ...],
    epsilon: float,
    cache: KVCache,
    slot: jax.Array,
) -> tuple[jax.Array, KVCache]:
    """The queries [B, H, 1, K], scaled, and the cache with the new keys and values."""
    cos, sin = rotary
    scale = layer.query_norm_K.size**-0.5  # of the scores, applied before the queries are cast
    query_BxHxK = _rows_first(jnp.tensordot(layer.query_HxKxD, normed_DxB, axes=1))
    key_value_Bx2xNxK = _rows_first(jnp.tensordot(layer.key_value_2xNxKxD, normed_DxB, axes=1))
    query = rms_norm(query_BxHxK[:, :, None], layer.query_norm_K, epsilon)
    key = rms_norm(key_value_Bx2xNxK[:, 0, :, None], layer.key_norm_K, epsilon)
    key_BxNxKx1 = jnp.swapaxes(apply_rotary(key, cos, sin), 2, 3)
    new = KVCache(key_BxNxKx1, key_value_Bx2xNxK[:, 1, :, None])

    def write(kept: jax.Array, new: jax.Array, axis: int) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(kept, new, slot, axis)

    cache = jax.tree.map(write, cache, new, COLUMNS)
    return apply_rotary(query, cos * scale, sin * scale), cache


def _attend(query_BxHx1xK: jax.Array, cache: KVCache, valid_BxS: jax.Array) -> jax.Array:
    """Attention of one new token in each row to its cache, [B, H, K]."""
    B, N, K, _ = cache.keys.shape
    query_BxNxGxK = query_BxHx1xK.reshape(B, N, -1, K)
    scores_BxNxGxS = jnp.einsum(
        "bngk,bnks->bngs", query_BxNxGxK, cache.keys, preferred_element_type=jnp.float32
    )
    scores_BxNxGxS = jnp.where(valid_BxS[:, None, None], scores_BxNxGxS, attention.MASKED)
    weights_BxNxGxS = jax.nn.softmax(scores_BxNxGxS, axis=-1).astype(cache.values.dtype)
    attended = jnp.einsum("bngs,bnsk->bngk", weights_BxNxGxS, cache.values)
    return attended.reshape(B, -1, K)


def logits(hidden_BxD: jax.Array, head_VxD: jax.Array, vocab_size: int) -> jax.Array:
    """As `qwen3.logits`, [B, V], but faster for few rows."""
    return qwen3.without_unused(
        _rows_first(
            jnp.einsum(
                "vd,bd->vb",
                head_VxD.astype(hidden_BxD.dtype),
                hidden_BxD,
                preferred_element_type=jnp.float32,
            )
        ),
        vocab_size,
    )


def _rows_first(product: jax.Array) -> jax.Array:
    """A product of weights and [inputs, B], its last axis moved to the front.

    Without the barrier, XLA would swap the product's factors in place of moving the axis.
    """
    return jnp.moveaxis(jax.lax.optimization_barrier(product), -1, 0)
