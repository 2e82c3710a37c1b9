"""Qwen3 (dense) in Flax NNX: one definition for every size.

Each parameter is described once, where its module creates it: shape, initialiser, logical axes.
`init_params`, `abstract_params` and `logical_axes` are three views of that description. Parameters
travel as a plain pytree (nested dicts of arrays), so the sampler, the student's forward pass, the
teacher's forward pass, the optimizer and the checkpoints all hold the same thing.

Shapes: B batch, T query positions, S key positions, D model width, H query heads, N key/value
heads, G = H / N queries per key/value head, K head width, F feed-forward width, V vocabulary,
L layers. Layers also take rows that lie behind each other, [B * T, ...] in place of [B, T, ...].
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from opsdc_jax import sharding
from opsdc_jax.models import attention
from opsdc_jax.models.gated import gated
from opsdc_jax.models.rope import Yarn, apply_rotary, rotary_tables

Params = dict[str, Any]

UNROLLED_LAYERS = 8  # at most so many, on a CPU, see `_unrolls`

# (query, keys, values) -> attended: [B, H, T, K], twice [B, N, S, K] -> [B, H, T, K]
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

# What the backward pass does not compute again, a layer; its input is kept in any case.
_SAVE_ATTENTION = jax.checkpoint_policies.save_only_these_names(attention.RESIDUALS)
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": _SAVE_ATTENTION,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _SAVE_ATTENTION
    ),
}


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
    """Architecture (field names are those of Hugging Face's config.json) and how to compute it.

    Attributes:
      yarn: scaling of the rotary embeddings; None is the default kind.
      compute_dtype: dtype of activations and matrix products; norms, softmax and rotary angles
        stay in float32, and parameters are cast where they are used.
      attention: how attention is computed, see `attention.choose`.
      remat: what the backward pass computes again. "none": nothing. "full": each layer, from its
        input, D numbers a token. "attention": the same but for attention itself, whose output and
        log-sum-exp are kept, H (K + 1) numbers a token and layer more; it is "full" where attention
        is "dense" or "cudnn". "dots": norms, rotary embeddings and activation functions only; every
        product with a weight is kept too, (2 H + 2 N) K + 2 D + 2 F numbers or so.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 1_000_000.0
    yarn: Yarn | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 40_960
    compute_dtype: str = "float32"
    attention: str = "auto"
    remat: str = "none"


class KVCache(NamedTuple):
    """Keys (after norm and RoPE) and values of one layer: each [B, N, S, K], in compute dtype."""

    keys: jax.Array
    values: jax.Array


def _param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    """A weight drawn from N(0, 0.02), the initialiser of the Qwen family."""
    init = nnx.initializers.normal(stddev=0.02)
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32."""

    def __init__(self, size: int, axis: str, epsilon: float):
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32), axes=(axis,))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        # Cast before the scale, as the published model does: in bf16 the order is visible.
        return (x32 * inverse_rms).astype(x.dtype) * self.scale[...].astype(x.dtype)


class Attention(nnx.Module):
    """Self-attention with RMS-normalised queries and keys (normalised before RoPE)."""

    def __init__(self, config: Qwen3Config, rngs: nnx.Rngs):
        D, H, N, K = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.query = _param(rngs, (D, H, K), ("embed", "heads", "head_dim"))
        self.key = _param(rngs, (D, N, K), ("embed", "kv_heads", "head_dim"))
        self.value = _param(rngs, (D, N, K), ("embed", "kv_heads", "head_dim"))
        self.out = _param(rngs, (H, K, D), ("heads", "head_dim", "embed"))
        self.query_norm = RMSNorm(K, "head_dim", config.rms_norm_eps)
        self.key_norm = RMSNorm(K, "head_dim", config.rms_norm_eps)
        self.head_dim = K

    def __call__(
        self,
        x_BxTxD: jax.Array,
        rotary: tuple[jax.Array, ...],
        attend: Attend,
        cache: KVCache | None = None,
        slot: jax.Array | int = 0,
    ) -> tuple[jax.Array, KVCache]:
        """Attends over the T new positions, or over `cache` after writing them at `slot`."""
        cos, sin = rotary
        scale = self.head_dim**-0.5  # of the scores, applied before the queries are cast

        def project(kernel: nnx.Param) -> jax.Array:
            return jnp.einsum("...d,dhk->...hk", x_BxTxD, kernel[...].astype(x_BxTxD.dtype))

        def rotated(x_BxTxHxK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
            return apply_rotary(jnp.swapaxes(x_BxTxHxK, -2, -3), cos, sin)

        query = rotated(self.query_norm(project(self.query)), cos * scale, sin * scale)
        keys = rotated(self.key_norm(project(self.key)), cos, sin)
        values = jnp.swapaxes(project(self.value), -2, -3)
        if cache is not None:
            start = (0, 0, slot, 0)
            keys = jax.lax.dynamic_update_slice(cache.keys, keys, start)
            values = jax.lax.dynamic_update_slice(cache.values, values, start)
        attended = attend(query, keys, values)
        attended = jnp.swapaxes(attended, -2, -3)
        out = jnp.einsum("...hk,hkd->...d", attended, self.out[...].astype(x_BxTxD.dtype))
        return out, KVCache(keys, values)


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Qwen3Config, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.intermediate_size
        self.gate = _param(rngs, (D, F), ("embed", "mlp"))
        self.up = _param(rngs, (D, F), ("embed", "mlp"))
        self.down = _param(rngs, (F, D), ("mlp", "embed"))

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        dtype = x_BxTxD.dtype
        gate, up = (x_BxTxD @ kernel[...].astype(dtype) for kernel in (self.gate, self.up))
        return gated(gate, up) @ self.down[...].astype(dtype)


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP, each with a residual connection."""

    def __init__(self, config: Qwen3Config, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.hidden_size, "embed", config.rms_norm_eps)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, "embed", config.rms_norm_eps)
        self.mlp = MLP(config, rngs)

    def __call__(
        self,
        x_BxTxD: jax.Array,
        rotary: tuple[jax.Array, ...],
        attend: Attend,
        cache: KVCache | None = None,
        slot: jax.Array | int = 0,
    ) -> tuple[jax.Array, KVCache]:
        attended, cache = self.attention(self.attention_norm(x_BxTxD), rotary, attend, cache, slot)
        x_BxTxD = x_BxTxD + attended
        return x_BxTxD + self.mlp(self.mlp_norm(x_BxTxD)), cache


class Qwen3(nnx.Module):
    """Embedding, L stacked decoder layers (leading axis "layers"), final norm, output head."""

    def __init__(self, config: Qwen3Config, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.num_hidden_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make_layers(layer_rngs: nnx.Rngs) -> DecoderLayer:
            return DecoderLayer(config, layer_rngs)

        shape, axes = (config.vocab_size, config.hidden_size), ("vocab", "embed")
        self.config = config
        self.embedding = _param(rngs, shape, axes)
        self.layers = make_layers(rngs)
        self.final_norm = RMSNorm(config.hidden_size, "embed", config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.head = _param(rngs, shape, axes)

    def embed(self, tokens: jax.Array) -> jax.Array:
        return self.embedding[...][tokens].astype(self.config.compute_dtype)

    def rotary(self, positions_BxT: jax.Array) -> tuple[jax.Array, ...]:
        config = self.config
        return rotary_tables(positions_BxT, config.head_dim, config.rope_theta, config.yarn)

    def __call__(
        self,
        tokens_BxT: jax.Array,
        positions_BxT: jax.Array,
        attend: Attend,
        mesh: Mesh | None,
        keep: bool,
    ) -> tuple[jax.Array, KVCache | None]:
        """Hidden states after the final norm, and the stacked caches [L, ...] if `keep`."""
        rotary = self.rotary(positions_BxT)
        layer_def, layers = nnx.split(self.layers)

        def placed(x: jax.Array) -> jax.Array:
            if mesh is None or mesh.size == 1:
                return x
            return jax.lax.with_sharding_constraint(x, sharding.between_layers(mesh, x.shape[1]))

        def body(x: jax.Array, layer: Any) -> tuple[jax.Array, KVCache | None]:
            x, cache = nnx.merge(layer_def, layer)(x, rotary, attend)
            return placed(x), cache if keep else None

        if self.config.remat != "none":
            policy = REMAT_POLICIES[self.config.remat]
            body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        unroll = _unrolls(self.config, mesh)
        x, caches = jax.lax.scan(body, placed(self.embed(tokens_BxT)), layers, unroll=unroll)
        return self.final_norm(x), caches


def _unrolls(config: Qwen3Config, mesh: Mesh | None) -> bool:
    """Whether the scan over the layers becomes a program of so many layers.

    On a CPU, a scan fills, writes and reads a stack for every array that the backward pass keeps.
    A deep model compiles faster as a scan, and rematerialization relies on one.
    """
    device = mesh.devices.flat[0] if mesh is not None else jax.devices()[0]
    fits = config.num_hidden_layers <= UNROLLED_LAYERS and config.remat == "none"
    return fits and device.platform == "cpu"


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
    attend: Attend = functools.partial(
        attention.attention,
        implementation=config.attention,
        valid_BxT=valid_BxT,
        lengths_B=lengths_B,
        mesh=mesh,
    )
    if positions_BxT is None:
        positions_BxT = jnp.arange(tokens_BxT.shape[1], dtype=jnp.int32)[None, :]
    B, T = tokens_BxT.shape
    if mesh is None or mesh.size == 1:
        # Products of two-dimensional arrays: for the gradient of a weight, a sum over rows and
        # positions, XLA would otherwise copy both factors into another order first.
        positions_BxT = jnp.broadcast_to(positions_BxT, (B, T)).reshape(B * T)
        tokens_BxT, attend = tokens_BxT.reshape(B * T), _row_by_row(attend, B)
    hidden, _ = _run(params, config, tokens_BxT, positions_BxT, attend, mesh, keep=False)
    return hidden.reshape(B, T, -1)


def _row_by_row(attend: Attend, B: int) -> Attend:
    """Attention within each of B rows that lie behind each other: [H, B * T, K]."""

    def split(x: jax.Array) -> jax.Array:
        H, _, K = x.shape
        return jnp.swapaxes(x.reshape(H, B, -1, K), 0, 1)

    def attend_rows(query: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        out = attend(*map(split, (query, keys, values)))
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
    """Like `forward`, and the caches of all layers stacked: each [L, B, N, T, K]."""
    attend = functools.partial(
        attention.attention, implementation=config.attention, valid_BxT=valid_BxT, mesh=mesh
    )
    hidden, caches = _run(params, config, tokens_BxT, positions_BxT, attend, mesh, keep=True)
    assert caches is not None
    return hidden, caches


def _run(
    params: Params,
    config: Qwen3Config,
    tokens_BxT: jax.Array,
    positions_BxT: jax.Array,
    attend: Attend,
    mesh: Mesh | None,
    keep: bool,
) -> tuple[jax.Array, KVCache | None]:
    model = nnx.merge(described(config)[0], params)
    return model(tokens_BxT, positions_BxT, attend, mesh, keep)


def unembedding(params: Params) -> jax.Array:
    """The output head, [V, D]: the embedding itself where the two are tied."""
    return params["head"] if "head" in params else params["embedding"]


def logits(hidden: jax.Array, head_VxD: jax.Array, vocab_size: int) -> jax.Array:
    """Float32 logits [..., V]; rows beyond the tokenizer's `vocab_size` entries get -1e30.

    The embedding of a published Qwen3 has more rows than its tokenizer has entries. Those rows
    were never trained: they are no part of the distribution, here and so everywhere.
    """
    head_VxD = head_VxD.astype(hidden.dtype)
    out = jnp.einsum("...d,vd->...v", hidden, head_VxD, preferred_element_type=jnp.float32)
    V = head_VxD.shape[0]
    return out if vocab_size == V else jnp.where(jnp.arange(V) < vocab_size, out, attention.MASKED)
