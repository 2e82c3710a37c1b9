"""Qwen3 one token at a time: what decoding does otherwise than `qwen3.forward`.

Shapes: B rows, S cache slots, D model width.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from opsdc_jax.models import attention, qwen3
from opsdc_jax.models.qwen3 import KVCache, Params, Qwen3Config


def unstack_layers(params: Params, config: Qwen3Config) -> list[Params]:
    """Each layer's parameters as leaves of their own, in compute dtype.

    A decode step multiplies few rows by every weight: reading a layer out of the stack at each
    token would copy it first.
    """
    dtype = jnp.dtype(config.compute_dtype)
    return [
        jax.tree.map(lambda leaf, i=i: leaf[i].astype(dtype), params["layers"])
        for i in range(config.num_hidden_layers)
    ]


def decode_step(
    params: Params,
    layers: list[Params],
    config: Qwen3Config,
    token_B: jax.Array,
    position_B: jax.Array,
    caches: list[KVCache],
    slot: jax.Array,
    valid_BxS: jax.Array,
) -> tuple[jax.Array, list[KVCache]]:
    """One token of every sequence through all layers.

    Args:
      layers: `unstack_layers(params, config)`.
      position_B: rotary position of the new token in each row.
      caches: one `KVCache` of S slots per layer.
      slot: index at which the new keys and values are written, the same for all rows.
      valid_BxS: slots the new token may attend to, its own included.

    Returns:
      hidden states [B, D] after the final norm, and the updated caches.
    """
    model = nnx.merge(qwen3.described(config)[0], params)
    layer_def, _ = nnx.split(model.layers)
    rotary = model.rotary(position_B[:, None])
    x = model.embed(token_B[:, None])
    attend = functools.partial(attention.dense, visible_BxTxS=valid_BxS[:, None, :])
    updated = []
    for layer, cache in zip(layers, caches, strict=True):
        x, cache = nnx.merge(layer_def, layer)(x, rotary, attend, cache, slot)
        updated.append(cache)
    return model.final_norm(x)[:, 0], updated
