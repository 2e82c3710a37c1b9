"""Random numbers with unrolled rounds are JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsdc_jax import threefry


@pytest.mark.parametrize("shape", [(), (1,), (7,), (256,), (3, 5), (4097,)])
def test_numbers_are_those_of_the_same_keys(shape):
    """To the last bit, jitted and for several keys at once, as a sampler draws them."""

    def drawn(key):
        return jax.random.bits(key, shape), jax.random.gumbel(key, shape)

    def all_drawn(keys):
        return jax.vmap(drawn)(jax.vmap(jax.random.fold_in)(keys, jnp.arange(3) * 1000))

    keys = jax.random.split(jax.random.key(2**31 + 5), 3)
    ours = jax.jit(lambda keys: all_drawn(threefry.unrolled(keys)))(keys)
    for found, expected in zip(ours, jax.jit(all_drawn)(keys), strict=True):
        assert found.shape == (3, *shape)
        np.testing.assert_array_equal(found, expected)


def test_keys_folded_and_split_are_the_same():
    key = jax.random.key(11)
    same = threefry.unrolled(key)
    for data in (0, 1, 2**32 - 1):
        data = np.uint32(data)
        folded = jax.random.fold_in(same, data), jax.random.fold_in(key, data)
        np.testing.assert_array_equal(*map(jax.random.key_data, folded))
    np.testing.assert_array_equal(
        *(jax.random.key_data(jax.random.split(given, 4)) for given in (same, key))
    )


def test_other_widths_are_refused():
    with pytest.raises(NotImplementedError, match="3 numbers of 16 bits"):
        jax.random.bits(threefry.unrolled(jax.random.key(0)), (3,), jnp.uint16)


def test_keys_of_another_generator_stay_theirs():
    keys = jax.random.split(jax.random.key(3, impl="rbg"), 2)
    kept = jax.jit(threefry.unrolled)(keys)
    assert kept.dtype == keys.dtype
    np.testing.assert_array_equal(*map(jax.random.key_data, (kept, keys)))
