"""Every implementation of attention against a float64 reference, values and gradients."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error

from opsdc_jax.models import attention

B, H, N, K = 2, 4, 2, 16
WANTED = ("query", "keys", "values")


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs in float64, and for each row where its tokens begin and how many there are."""

    query: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    direction: np.ndarray
    valid: np.ndarray


@functools.cache
def case(T: int, padding: str, head_dim: int = K) -> Case:
    rng = np.random.default_rng(T)
    shapes = [(B, H, T, head_dim), (B, N, T, head_dim), (B, N, T, head_dim), (B, H, T, head_dim)]
    query, keys, values, direction = (rng.normal(size=shape) for shape in shapes)
    lengths = np.array([T, T // 3])[:, None]
    places = np.arange(T)
    valid = {
        "none": np.ones((B, T), bool),
        "left": places >= T - lengths,
        "right": places < lengths,
    }[padding]
    # Padding holds large values: one that is seen shows.
    garbage = np.where(valid, 0.0, 50.0)[:, None, :, None]
    direction = direction * valid[:, None, :, None]
    return Case(query + garbage, keys + garbage, values + garbage, direction, valid)


def reference(given: Case) -> tuple[np.ndarray, list[np.ndarray]]:
    """Values, and the gradients of their product with `direction`; keys repeated, in float64."""

    def out(query, keys, values):
        keys, values = (jnp.repeat(x, H // N, axis=1) for x in (keys, values))
        scores = jnp.einsum("bhtk,bhsk->bhts", query, keys)
        seen = np.tril(np.ones(scores.shape[-2:], bool)) & given.valid[:, None, None, :]
        return jax.nn.softmax(jnp.where(seen, scores, -1e300)) @ values

    with jax.enable_x64(True):
        arrays = tuple(jnp.asarray(getattr(given, name)) for name in WANTED)
        loss = lambda *arrays: jnp.sum(out(*arrays) * given.direction)  # noqa: E731
        gradients = jax.grad(loss, argnums=(0, 1, 2))(*arrays)
        return np.asarray(out(*arrays)), [np.asarray(leaf) for leaf in gradients]


def check(function, given: Case, dtype, tolerance):
    """Values and gradients at real tokens; gradients at padding are zero."""
    expected, expected_gradients = reference(given)
    arrays = tuple(jnp.asarray(getattr(given, name), dtype) for name in WANTED)

    def loss(*arrays):
        out = function(*arrays)
        return jnp.sum(out * given.direction.astype(np.float32)), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
    assert out.dtype == dtype
    assert np.isfinite(np.asarray(out, np.float32)).all()
    real = given.valid[:, None, :, None]
    assert relative_error(out * real, expected * real) <= tolerance
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        assert got.dtype == dtype
        assert relative_error(got, wanted) <= tolerance
        assert not np.any(np.asarray(got, np.float32) * ~real)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize(("T", "block"), [(32, 8), (37, 10), (9, 16)])
def test_blockwise_is_exact(T, block, padding):
    given = case(T, padding)
    valid = given.valid if padding == "left" else None
    check(lambda *arrays: attention.blockwise(*arrays, valid, block), given, jnp.float32, 2e-5)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_dense_is_exact(padding):
    given = case(37, padding)
    valid = given.valid if padding == "left" else None
    dense = functools.partial(attention.attention, implementation="dense", valid_BxT=valid)
    check(dense, given, jnp.float32, 2e-5)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_splash_is_exact(padding):
    """The TPU kernel, emulated: padded to the kernel's multiple, keys of a group not repeated."""
    given = case(150, padding, 128)
    valid = given.valid if padding == "left" else None
    check(
        lambda *arrays: attention.splash(*arrays, valid, interpret=True), given, jnp.float32, 2e-5
    )


def test_cudnn_gets_lengths_and_is_exact_where_xla_takes_its_place(monkeypatch):
    """The arguments are right: with them, JAX's own implementation gives the reference."""
    given, asked = case(37, "right"), []

    def instead(*arrays, implementation, **arguments):
        asked.append(implementation)
        return original(*arrays, implementation="xla", **arguments)

    original = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    lengths = given.valid.sum(axis=1)
    check(lambda *arrays: attention.cudnn(*arrays, lengths), given, jnp.float32, 2e-5)
    assert asked == ["cudnn"]


@pytest.mark.skipif(
    "nvidia" not in jax.devices()[0].device_kind.lower(), reason="cuDNN needs an NVIDIA GPU"
)
def test_cudnn_is_close_in_bfloat16():
    given = case(256, "right", 64)
    lengths = given.valid.sum(axis=1)
    check(lambda *arrays: attention.cudnn(*arrays, lengths), given, jnp.bfloat16, 2e-2)


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
def test_it_is_close_in_bfloat16(monkeypatch, implementation):
    monkeypatch.setattr(attention, "BLOCK", 10)
    function = functools.partial(attention.attention, implementation=implementation)
    check(function, case(37, "right"), jnp.bfloat16, 2e-2)


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
def test_a_query_that_sees_nothing_gives_no_gradients(implementation):
    """Padding on the left: its first queries have no key, whatever hangs on what they give."""
    given = case(37, "left")
    arrays = tuple(jnp.asarray(getattr(given, name), jnp.float32) for name in WANTED)

    def at_padding(*arrays):
        out = attention.attention(*arrays, implementation=implementation, valid_BxT=given.valid)
        return jnp.sum(out * ~given.valid[:, None, :, None])

    for gradient in jax.grad(at_padding, argnums=(0, 1, 2))(*arrays):
        assert not np.any(gradient)


CPU = types.SimpleNamespace(platform="cpu", device_kind="cpu")
GPU = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
TPU = types.SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")


@pytest.mark.parametrize(
    ("name", "device", "positions", "head_dim", "dtype", "has_mask", "chosen"),
    [
        ("auto", TPU, 9216, 128, "bfloat16", False, "splash"),
        ("auto", TPU, 1024, 128, "bfloat16", True, "splash"),
        ("auto", GPU, 9216, 128, "bfloat16", False, "cudnn"),
        ("auto", GPU, 9216, 128, "bfloat16", True, "blockwise"),
        ("auto", GPU, 9216, 128, "float32", False, "blockwise"),
        ("auto", GPU, 9216, 256, "bfloat16", False, "blockwise"),
        ("auto", CPU, 512, 128, "float32", False, "blockwise"),
        ("auto", CPU, 511, 128, "float32", True, "dense"),
        ("cudnn", GPU, 1024, 128, "bfloat16", True, "blockwise"),
        ("cudnn", GPU, 100, 128, "bfloat16", True, "dense"),
        ("dense", TPU, 9216, 128, "bfloat16", False, "dense"),
        ("blockwise", GPU, 16, 128, "bfloat16", False, "blockwise"),
        ("splash", CPU, 16, 128, "float32", True, "splash"),
    ],
)
def test_the_rule(name, device, positions, head_dim, dtype, has_mask, chosen):
    shape = (1, 4, positions, head_dim)
    assert attention.choose(name, device, shape, jnp.dtype(dtype), has_mask) == chosen
