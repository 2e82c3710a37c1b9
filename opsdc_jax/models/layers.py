"""The layers of Qwen3: what its parameters are, and what one decoder layer computes.

Shapes: B batch, T query positions, S key positions, D model width, H query heads, N key/value
heads, G = H / N queries per key/value head, K head width, F feed-forward width, V vocabulary,
L layers. Layers also take rows that lie behind each other, [B * T, ...] in place of [B, T, ...].
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from opsdc_jax.models.rope import Yarn, apply_rotary

# (query, keys, values) -> attended: [B, H, T, K], twice [B, N, S, K] -> [B, H, T, K]
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


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
        is "cudnn". "dots": norms, rotary embeddings and activation functions only; every product
        with a weight is kept too, (2 H + 2 N) K + 2 D + 2 F numbers or so.
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
    """Keys (after norm and RoPE) and values of one layer, in compute dtype.

    They lie as decoding's products read them, whose outputs come last: scores [.., S] and
    attended values [.., K].

    Attributes:
      keys: [B, N, K, S].
      values: [B, N, S, K].
    """

    keys: jax.Array
    values: jax.Array


COLUMNS = KVCache._make((-1, -2))  # the axes of S: of the keys, of the values


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    """A weight drawn from N(0, 0.02), the initialiser of the Qwen family."""
    init = nnx.initializers.normal(stddev=0.02)
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32."""

    def __init__(self, size: int, axis: str, epsilon: float):
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32), axes=(axis,))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...].astype(x.dtype), self.epsilon)


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float, axis: int = -1) -> jax.Array:
    """x / rms(x) * scale over an axis, computed in float32; `scale` has the dtype of x."""
    x32 = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=axis, keepdims=True) + epsilon)
    # Cast before the scale, as the published model does: in bf16 the order is visible.
    return (x32 * inverse_rms).astype(x.dtype) * scale


class Attention(nnx.Module):
    """Self-attention with RMS-normalised queries and keys (normalised before RoPE)."""

    def __init__(self, config: Qwen3Config, rngs: nnx.Rngs):
        D, H, N, K = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.query = weight(rngs, (D, H, K), ("embed", "heads", "head_dim"))
        self.key = weight(rngs, (D, N, K), ("embed", "kv_heads", "head_dim"))
        self.value = weight(rngs, (D, N, K), ("embed", "kv_heads", "head_dim"))
        self.out = weight(rngs, (H, K, D), ("heads", "head_dim", "embed"))
        self.query_norm = RMSNorm(K, "head_dim", config.rms_norm_eps)
        self.key_norm = RMSNorm(K, "head_dim", config.rms_norm_eps)
        self.head_dim = K

    def __call__(
        self,
        x_BxTxD: jax.Array,
        rotary: tuple[jax.Array, ...],
        attend: Attend,
    ) -> tuple[jax.Array, KVCache]:
        """Attends over the T positions; returns their keys and values too."""
        cos, sin = rotary
        scale = self.head_dim**-0.5  # of the scores, applied before the queries are cast

        def project(kernel: nnx.Param) -> jax.Array:
            return jnp.einsum("...d,dhk->...hk", x_BxTxD, kernel[...].astype(x_BxTxD.dtype))

        def rotated(x_BxTxHxK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
            return apply_rotary(jnp.swapaxes(x_BxTxHxK, -2, -3), cos, sin)

        query = rotated(self.query_norm(project(self.query)), cos * scale, sin * scale)
        keys = rotated(self.key_norm(project(self.key)), cos, sin)
        values = jnp.swapaxes(project(self.value), -2, -3)
        attended = attend(query, keys, values)
        attended = jnp.swapaxes(attended, -2, -3)
        out = jnp.einsum("...hk,hkd->...d", attended, self.out[...].astype(x_BxTxD.dtype))
        return out, KVCache(jnp.swapaxes(keys, -1, -2), values)


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Qwen3Config, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.intermediate_size
        self.gate = weight(rngs, (D, F), ("embed", "mlp"))
        self.up = weight(rngs, (D, F), ("embed", "mlp"))
        self.down = weight(rngs, (F, D), ("mlp", "embed"))

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        dtype = x_BxTxD.dtype
        gate, up = (x_BxTxD @ kernel[...].astype(dtype) for kernel in (self.gate, self.up))
        return _gated(gate, up) @ self.down[...].astype(dtype)


@jax.custom_vjp
def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up. The backward pass keeps these two only, and computes the rest again."""
    return jax.nn.silu(gate) * up


def _gated_backward(
    kept: tuple[jax.Array, jax.Array], out_bar: jax.Array
) -> tuple[jax.Array, jax.Array]:
    gate, up = kept
    sigmoid = jax.nn.sigmoid(gate)
    return out_bar * up * sigmoid * (1 + gate * (1 - sigmoid)), out_bar * gate * sigmoid


_gated.defvjp(lambda gate, up: (_gated(gate, up), (gate, up)), _gated_backward)


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
    ) -> tuple[jax.Array, KVCache]:
        attended, cache = self.attention(self.attention_norm(x_BxTxD), rotary, attend)
        x_BxTxD = x_BxTxD + attended
        return x_BxTxD + self.mlp(self.mlp_norm(x_BxTxD)), cache
