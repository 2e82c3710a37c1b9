"""JAX's own random numbers, with the rounds of their hash written out.

On a CPU, JAX lowers the 20 rounds of Threefry-2x32 to a loop over five groups of them, which keeps
its arrays in memory. Written out they are one fusion: the same numbers in a third of the time. On
other devices JAX writes them out itself.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import random

_NAME = "threefry2x32"
_ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)


def unrolled(keys: jax.Array) -> jax.Array:
    """The same keys, from which the same is drawn.

    Keys of another generator are given back, as are all without `jax_threefry_partitionable` (JAX's
    default), which draws other numbers.
    """
    same = jax.config.jax_threefry_partitionable  # type: ignore[attr-defined]
    if jax.random.key_impl(keys) != _NAME or not same:
        return keys
    return jax.random.wrap_key_data(jax.random.key_data(keys), impl=_UNROLLED)


def _hash(key_2: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011, section 3.3) of the words (0, count)."""
    first, second = key_2
    schedule = first, second, first ^ second ^ np.uint32(0x1BD11BDA)
    x, y = jnp.broadcast_to(first, counts.shape), counts + second
    for group in range(5):
        for bits in _ROTATIONS[group % 2]:
            x = x + y
            y = x ^ (y << np.uint32(bits) | y >> np.uint32(32 - bits))
        x = x + schedule[(group + 1) % 3]
        y = y + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return x, y


def _random_bits(key_2: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    size = int(np.prod(shape))
    if bit_width != 32 or size >= 2**32:
        return jax.random.bits(_plain(key_2), shape, f"uint{bit_width}")
    x, y = _hash(key_2, jax.lax.iota(jnp.uint32, size).reshape(shape))
    return x ^ y


def _fold_in(key_2: jax.Array, data: int | jax.Array) -> jax.Array:
    return jnp.stack(_hash(key_2, jnp.asarray(data, jnp.uint32)))


def _plain(key_2: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(key_2, impl=_NAME)


_UNROLLED = random.define_prng_impl(
    key_shape=(2,),
    seed=lambda seed: jax.random.key_data(jax.random.key(seed, impl=_NAME)),
    split=lambda key_2, shape: jax.random.key_data(jax.random.split(_plain(key_2), shape)),
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="threefry2x32_unrolled",
    tag="fry_unrolled",
)
