"""Prompts, padded on the left, through the model: what a response begins from.

By the stack of all layers, within a caller's program, where the parameters are at hand. Or by
decoding's weights, a layer at a time: then the layers need not be held in two layouts, and a model
of any depth compiles as one layer.

Shapes: M prompts, P prompt width, D model width, N key/value heads, K head width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from opsdc_jax import sharding
from opsdc_jax.models import decode, qwen3
from opsdc_jax.models.layers import KVCache, Qwen3Config, rms_norm
from opsdc_jax.models.qwen3 import Params
from opsdc_jax.models.rope import rotary_tables


class Prefilled(NamedTuple):
    """Prompts that have run: the last tokens' hidden states, and a cache of P columns per layer."""

    hidden_MxD: jax.Array
    caches: list[KVCache]


def by_stack(
    params: Params,
    config: Qwen3Config,
    mesh: Mesh,
    prompts_MxP: jax.Array,
    lengths_M: jax.Array,
) -> Prefilled:
    """By the parameters of `decode.for_decoding`; rows stay split as they are."""
    positions_MxP, valid_MxP = _positions(prompts_MxP, lengths_M)
    hidden_MxPxD, stacked = qwen3.prefill(
        params,
        config,
        prompts_MxP,
        positions_BxT=positions_MxP,
        valid_BxT=valid_MxP,
        mesh=mesh,
    )
    # Stated: a cache that followed the compiler's choice could be whole on every device.
    split = sharding.spec(sharding.DECODE_RULES, ("layers", "batch", "kv_heads", None, None))
    stacked = jax.lax.with_sharding_constraint(stacked, NamedSharding(mesh, split))
    caches = [
        jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(config.num_hidden_layers)
    ]
    return Prefilled(hidden_MxPxD[:, -1], caches)


def by_layers(
    weights: decode.Weights,
    config: Qwen3Config,
    mesh: Mesh,
    prompts_MxP: jax.Array,
    lengths_M: jax.Array,
) -> Prefilled:
    """By decoding's weights: one program, of one layer, runs for each.

    Returns:
      every row on every device that holds a part of its heads: any slot may take it.
    """
    x_MxPxD, rotary, valid_MxP = _into_layers(weights.params, config, mesh, prompts_MxP, lengths_M)
    caches = []
    for layer in weights.layers:
        x_MxPxD, cache = _through_layer(layer, config, mesh, x_MxPxD, rotary, valid_MxP)
        caches.append(cache)
    return Prefilled(_out_of_layers(weights.params, config, mesh, x_MxPxD), caches)


def cache_placement(mesh: Mesh) -> NamedSharding:
    """Of what `by_layers` returns for a layer."""
    split = sharding.spec(sharding.DECODE_RULES, (None, "kv_heads", None, None))
    return NamedSharding(mesh, split)


def _positions(prompts_MxP: jax.Array, lengths_M: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The position of each token in its prompt, and which tokens are real."""
    columns = jnp.arange(prompts_MxP.shape[1])
    first_M = prompts_MxP.shape[1] - lengths_M  # column of each row's first real token
    return jnp.maximum(columns - first_M[:, None], 0), columns >= first_M[:, None]


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _into_layers(
    params: Params, config: Qwen3Config, mesh: Mesh, prompts_MxP: jax.Array, lengths_M: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array]:
    """What the first layer takes: embedded tokens, rotary tables, and which tokens are real."""
    positions_MxP, valid_MxP = _positions(prompts_MxP, lengths_M)
    embedded = qwen3.embed(params, prompts_MxP).astype(config.compute_dtype)
    rotary = rotary_tables(positions_MxP, config.head_dim, config.rope_theta, config.yarn)
    return qwen3.between_layers(embedded, mesh), rotary, valid_MxP


@functools.partial(jax.jit, static_argnames=("config", "mesh"), donate_argnames="x_MxPxD")
def _through_layer(
    layer: decode.DecodeLayer,
    config: Qwen3Config,
    mesh: Mesh,
    x_MxPxD: jax.Array,
    rotary: tuple[jax.Array, ...],
    valid_MxP: jax.Array,
) -> tuple[jax.Array, KVCache]:
    params = decode.as_trained(layer)
    x_MxPxD, cache = qwen3.run_layer(params, config, x_MxPxD, rotary, valid_MxP, mesh)
    return x_MxPxD, jax.lax.with_sharding_constraint(cache, cache_placement(mesh))


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _out_of_layers(
    params: Params, config: Qwen3Config, mesh: Mesh, x_MxPxD: jax.Array
) -> jax.Array:
    """The final hidden state [M, D] of each prompt's last token."""
    scale_D = params["final_norm"]["scale"].astype(x_MxPxD.dtype)
    hidden_MxD = rms_norm(x_MxPxD[:, -1], scale_D, config.rms_norm_eps)
    return jax.lax.with_sharding_constraint(hidden_MxD, sharding.whole(mesh))
