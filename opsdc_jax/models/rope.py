"""Rotary position embeddings: default, and YaRN (arXiv 2309.00071) for longer contexts.

Shapes: B batch, H heads, T positions, K head width.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Yarn:
    """Parameters of YaRN, named as in config.json.

    Attributes:
      factor: how much longer the context is than the original one.
      original_max_position_embeddings: positions the model was pretrained on.
      beta_fast, beta_slow: rotations over the original context above which a pair of dimensions
        keeps its frequency, and below which its frequency is divided by `factor`.
      attention_factor: scale of cos and sin; None is 0.1 ln(factor) + 1.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


def frequencies(head_dim: int, theta: float, yarn: Yarn | None) -> tuple[np.ndarray, float]:
    """Angle per position of each pair of dimensions, [K/2] float32; and the scale of cos and sin.

    Args:
      theta: base of the frequencies.
      yarn: None for the default frequencies.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    plain = (1.0 / theta**exponents).astype(np.float32)
    if yarn is None:
        return plain, 1.0

    def pair_rotating(rotations: float) -> float:
        """Index of the pair that turns this often over the original context."""
        wavelengths = math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi))
        return head_dim * wavelengths / (2 * math.log(theta))

    low = max(math.floor(pair_rotating(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_rotating(yarn.beta_slow)), head_dim - 1)
    slow = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0, 1)
    scaled = plain / yarn.factor * slow + plain * (1 - slow)
    scale = yarn.attention_factor
    if scale is None:
        scale = 0.1 * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0
    return scaled.astype(np.float32), scale


def rotary_tables(
    positions_BxT: jax.Array,
    head_dim: int,
    theta: float,
    yarn: Yarn | None,
    in_memory: bool = False,
) -> tuple[jax.Array, ...]:
    """cos and sin of the rotary angles, each [B, 1, T, K/2] in float32; [1, T, K/2] from [T].

    Args:
      in_memory: they come out of a loop. On a CPU, XLA fuses a sine into all that reads it, and
        would form it again for every head of every layer; what a loop gives, it does not.
    """
    angles_per_position, scale = frequencies(head_dim, theta, yarn)
    angles = positions_BxT[..., None, :, None].astype(jnp.float32) * angles_per_position
    if in_memory:
        which = np.array([False, True])
        cos, sin = jax.lax.map(lambda odd: jax.lax.cond(odd, jnp.sin, jnp.cos, angles), which)
    else:
        cos, sin = jnp.cos(angles), jnp.sin(angles)
    return cos * scale, sin * scale


def apply_rotary(x_BxHxTxK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (k, k + K/2), computed in float32."""
    first, second = jnp.split(x_BxHxTxK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BxHxTxK.dtype)
