"""Random numbers with unrolled rounds are JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsdc_jax import sampling, threefry


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


def test_other_widths_are_jaxs_own():
    key = jax.random.key(5)
    for dtype in (jnp.uint8, jnp.uint16):
        np.testing.assert_array_equal(
            *(jax.random.bits(given, (33,), dtype) for given in (threefry.unrolled(key), key))
        )


def test_keys_of_another_generator_stay_theirs():
    keys = jax.random.split(jax.random.key(3, impl="rbg"), 2)
    kept = jax.jit(threefry.unrolled)(keys)
    assert kept.dtype == keys.dtype
    np.testing.assert_array_equal(*map(jax.random.key_data, (kept, keys)))


def test_numbers_that_are_not_partitionable_stay_theirs():
    with jax.threefry_partitionable(False):
        key = jax.random.key(5)
        np.testing.assert_array_equal(
            *(jax.random.bits(given, (7,)) for given in (threefry.unrolled(key), key))
        )


def test_tokens_are_drawn_so(monkeypatch):
    """On a CPU, JAX's own rounds are loops of the compiled program."""

    def loops():
        drawn = jax.jit(lambda *given: sampling.draw(*given, 0, sampling.SamplingParams()))
        keys = jax.random.split(jax.random.key(0), 2)
        return drawn.lower(jnp.zeros((2, 40)), keys).compile().as_text().count(" while(")

    unrolled = loops()
    monkeypatch.setattr(threefry, "unrolled", lambda keys: keys)
    assert unrolled < loops()
