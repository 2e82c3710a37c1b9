"""Qwen3 (dense) in Flax NNX: one definition for every size.

Each parameter is described once, where its module creates it: shape, initialiser, logical axes.
`init_params`, `abstract_params` and `logical_axes` are three views of that description. Parameters
travel as a plain pytree (nested dicts of arrays), so the sampler, the student's forward pass, the
teacher's forward pass, the optimizer and the checkpoints all hold the same thing.

Shapes: B batch, T query positions, S key positions, D model width, H query heads, N key/value
heads, G = H / N queries per key/value head, K head width, F feed-forward width, V vocabulary,
L layers. Layers also take rows that lie behind each other, [B * T, ...] in place of [B, T, ...].
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from opsdc_jax import sharding
from opsdc_jax.models import attention
from opsdc_jax.models.layers import Attend, DecoderLayer, KVCache, Qwen3Config, RMSNorm, weight
from opsdc_jax.models.rope import rotary_tables

Params = dict[str, Any]

# Up to so many layers are unrolled on a CPU, see `_unrolls`.
UNROLLED_LAYERS = 8

# What the backward pass does not compute again, a layer; its input is kept in any case.
_SAVE_ATTENTION = jax.checkpoint_policies.save_only_these_names(attention.RESIDUALS)
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": _SAVE_ATTENTION,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _SAVE_ATTENTION
    ),
}


class Qwen3(nnx.Module):
    """Embedding, L stacked decoder layers (leading axis "layers"), final norm, output head."""

    def __init__(self, config: Qwen3Config, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.num_hidden_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make_layers(layer_rngs: nnx.Rngs) -> DecoderLayer:
            return DecoderLayer(config, layer_rngs)

        shape, axes = (config.vocab_size, config.hidden_size), ("vocab", "embed")
        self.config = config
        self.embedding = weight(rngs, shape, axes)
        self.layers = make_layers(rngs)
        self.final_norm = RMSNorm(config.hidden_size, "embed", config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.head = weight(rngs, shape, axes)

    def __call__(
        self,
        embedded_BxTxD: jax.Array,
        positions_BxT: jax.Array,
        attend: Attend,
        mesh: Mesh | None,
        keep: bool,
    ) -> tuple[jax.Array, KVCache | None]:
        """Hidden states after the final norm, and the stacked caches [L, ...] if `keep`."""
        config = self.config
        unrolled = _unrolls(config, mesh)
        rotary = rotary_tables(
            positions_BxT,
            config.head_dim,
            config.rope_theta,
            config.yarn,
            in_memory=unrolled,  # what a scan reads is there anyway
        )
        layer_def, layers = nnx.split(self.layers)

        def body(x: jax.Array, layer: Any) -> tuple[jax.Array, KVCache | None]:
            x, cache = nnx.merge(layer_def, layer)(x, rotary, attend)
            return between_layers(x, mesh), cache if keep else None

        if config.remat != "none":
            policy = REMAT_POLICIES[config.remat]
            body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        x = between_layers(embedded_BxTxD.astype(config.compute_dtype), mesh)
        x, caches = jax.lax.scan(body, x, layers, unroll=unrolled)
        return self.final_norm(x), caches


def between_layers(x_BxTxD: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Hidden states, split over the mesh as `sharding.between_layers` says."""
    if mesh is None or mesh.size == 1:
        return x_BxTxD
    placed = sharding.between_layers(mesh, x_BxTxD.shape[1])
    return jax.lax.with_sharding_constraint(x_BxTxD, placed)


def _unrolls(config: Qwen3Config, mesh: Mesh | None) -> bool:
    """Whether the scan over the layers becomes a program of so many layers.

    On a CPU a scan's every array that the backward pass keeps is filled with zeros, written and
    read again as a slice of a stack, weights and their gradients too: a fifth of a small model's
    step. A deep model compiles faster as a scan, and rematerialization relies on one.
    """
    device = mesh.devices.flat[0] if mesh is not None else jax.devices()[0]
    shallow = config.num_hidden_layers <= UNROLLED_LAYERS
    return device.platform == "cpu" and shallow and config.remat == "none"


@functools.lru_cache(maxsize=64)
def described(config: Qwen3Config) -> tuple[nnx.GraphDef, Any]:
    """The static part of the model and its state with shapes in place of arrays."""
    return nnx.split(nnx.eval_shape(lambda: Qwen3(config, nnx.Rngs(0))))


def init_params(config: Qwen3Config, key: jax.Array) -> Params:
    """Fresh float32 parameters: norms at one, everything else from N(0, 0.02)."""
    return nnx.to_pure_dict(nnx.state(Qwen3(config, nnx.Rngs(key))))


def abstract_params(config: Qwen3Config) -> Params:
    """The tree of `init_params` as float32 `jax.ShapeDtypeStruct`s: nothing is allocated."""
    return nnx.to_pure_dict(described(config)[1])


def logical_axes(config: Qwen3Config) -> Params:
    """The tree of `init_params` with a tuple of logical axis names for each array."""

    def axes(path: tuple[Any, ...], variable: nnx.Variable) -> tuple[str, ...]:
        names = variable.get_metadata("axes")
        return ("layers", *names) if path[0].key == "layers" else names

    def is_variable(node: Any) -> bool:
        return isinstance(node, nnx.Variable)

    state = described(config)[1]
    return nnx.to_pure_dict(jax.tree.map_with_path(axes, state, is_leaf=is_variable))


def shardings(
    config: Qwen3Config, mesh: Mesh, rules: sharding.Rules = sharding.TRAIN_RULES
) -> Params:
    """The tree of `init_params` with a `NamedSharding` for each array.

    Args:
      rules: `sharding.TRAIN_RULES`, or `sharding.DECODE_RULES` with the mesh of decoding.

    Raises:
      InputError: the mesh does not fit the model.
    """
    return sharding.param_shardings(mesh, logical_axes(config), abstract_params(config), rules)


def embed(params: Params, tokens: jax.Array) -> jax.Array:
    """The tokens' rows of the embedding, [..., D]."""
    return params["embedding"][tokens]


def forward(
    params: Params,
    config: Qwen3Config,
    tokens_BxT: jax.Array,
    *,
    positions_BxT: jax.Array | None = None,
    valid_BxT: jax.Array | None = None,
    lengths_B: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Final hidden states, [B, T, D] in compute dtype; multiply by `unembedding` for logits.

    Args:
      positions_BxT: rotary positions; by default 0..T-1 in each row. Padding on the right needs
        neither argument: under the causal mask no real token sees it.
      valid_BxT: False marks positions no token may attend to (padding on the left).
      lengths_B: tokens of rows padded on the right, see `attention.attention`.
      mesh: where the arrays are; None is one device.
    """
    return forward_embedded(
        params,
        config,
        embed(params, tokens_BxT),
        positions_BxT=positions_BxT,
        valid_BxT=valid_BxT,
        lengths_B=lengths_B,
        mesh=mesh,
    )


def forward_embedded(
    params: Params,
    config: Qwen3Config,
    embedded_BxTxD: jax.Array,
    *,
    positions_BxT: jax.Array | None = None,
    valid_BxT: jax.Array | None = None,
    lengths_B: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """`forward` from what `embed` gives, for a caller who wants the gradient by that."""
    attend: Attend = functools.partial(
        attention.attention,
        implementation=config.attention,
        valid_BxT=valid_BxT,
        lengths_B=lengths_B,
        mesh=mesh,
    )
    if positions_BxT is None:
        positions_BxT = jnp.arange(embedded_BxTxD.shape[1], dtype=jnp.int32)[None, :]
    B, T, D = embedded_BxTxD.shape
    if mesh is None or mesh.size == 1:
        # Products of two-dimensional arrays: for the gradient of a weight, a sum over rows and
        # positions, XLA would otherwise copy both factors into another order first.
        positions_BxT = jnp.broadcast_to(positions_BxT, (B, T)).reshape(B * T)
        embedded_BxTxD, attend = embedded_BxTxD.reshape(B * T, D), _row_by_row(attend, B)
    hidden, _ = _run(params, config, embedded_BxTxD, positions_BxT, attend, mesh, keep=False)
    return hidden.reshape(B, T, D)


def _row_by_row(attend: Attend, B: int) -> Attend:
    """Attention within each of B rows that lie behind each other: [H, B * T, K]."""

    def split(x: jax.Array) -> jax.Array:
        H, _, K = x.shape
        return jnp.swapaxes(x.reshape(H, B, -1, K), 0, 1)

    def attend_rows(query: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        out = attend(split(query), split(keys), split(values))
        return jnp.swapaxes(out, 0, 1).reshape(query.shape)

    return attend_rows


def prefill(
    params: Params,
    config: Qwen3Config,
    tokens_BxT: jax.Array,
    *,
    positions_BxT: jax.Array,
    valid_BxT: jax.Array,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, KVCache]:
    """Like `forward`, and the caches of all layers stacked, of T columns each."""
    attend = _attend_valid(config, valid_BxT, mesh)
    embedded_BxTxD = embed(params, tokens_BxT)
    hidden, caches = _run(params, config, embedded_BxTxD, positions_BxT, attend, mesh, keep=True)
    assert caches is not None
    return hidden, caches


def run_layer(
    params: Params,
    config: Qwen3Config,
    x_BxTxD: jax.Array,
    rotary: tuple[jax.Array, ...],
    valid_BxT: jax.Array,
    mesh: Mesh,
) -> tuple[jax.Array, KVCache]:
    """One layer of `prefill`.

    Args:
      params: of this layer alone, as in `init_params`, but without the leading axis.
      rotary: `rotary_tables` of the positions.
    """
    x_BxTxD, cache = nnx.merge(_described_layer(config), params)(
        x_BxTxD, rotary, _attend_valid(config, valid_BxT, mesh)
    )
    return between_layers(x_BxTxD, mesh), cache


@functools.lru_cache(maxsize=64)
def _described_layer(config: Qwen3Config) -> nnx.GraphDef:
    """The static part of one layer."""
    return nnx.graphdef(nnx.eval_shape(lambda: DecoderLayer(config, nnx.Rngs(0))))


def _attend_valid(config: Qwen3Config, valid_BxT: jax.Array, mesh: Mesh | None) -> Attend:
    return functools.partial(
        attention.attention, implementation=config.attention, valid_BxT=valid_BxT, mesh=mesh
    )


def _run(
    params: Params,
    config: Qwen3Config,
    embedded_BxTxD: jax.Array,
    positions_BxT: jax.Array,
    attend: Attend,
    mesh: Mesh | None,
    keep: bool,
) -> tuple[jax.Array, KVCache | None]:
    model = nnx.merge(described(config)[0], params)
    return model(embedded_BxTxD, positions_BxT, attend, mesh, keep)


def unembedding(params: Params) -> jax.Array:
    """The output head, [V, D]: the embedding itself where the two are tied."""
    return params["head"] if "head" in params else params["embedding"]


def logits(hidden: jax.Array, head_VxD: jax.Array, vocab_size: int) -> jax.Array:
    """Float32 logits [..., V]; rows beyond the tokenizer's `vocab_size` entries get -1e30."""
    out = jnp.einsum(
        "...d,vd->...v",
        hidden,
        head_VxD.astype(hidden.dtype),
        preferred_element_type=jnp.float32,
    )
    return without_unused(out, vocab_size)


def without_unused(logits: jax.Array, vocab_size: int) -> jax.Array:
    """-1e30 in place of the logits [..., V] from `vocab_size` on.

    The embedding of a published Qwen3 has more rows than its tokenizer has entries. Those rows
    were never trained: they are no part of the distribution, here and so everywhere.
    """
    V = logits.shape[-1]
    masked = attention.MASKED
    return logits if vocab_size == V else jnp.where(jnp.arange(V) < vocab_size, logits, masked)
