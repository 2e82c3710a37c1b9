"""The divergences against a dense float64 brute force."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error, shapes_within

from opsdc_jax import divergences, losses
from opsdc_jax.config import DIVERGENCE_NAMES

B, R, D, V, ENTRIES = 3, 15, 24, 130, 117  # V - ENTRIES embedding rows lie beyond the tokenizer
N = B * R
INPUTS = np.random.default_rng(0)
STUDENT, TEACHER = INPUTS.normal(size=(2, N, D))
STUDENT_HEAD, TEACHER_HEAD = INPUTS.normal(size=(2, V, D)) * 0.4
TOKENS = INPUTS.integers(0, ENTRIES, N)
SAMPLER_LOGPROBS = -INPUTS.random(N) * 5
MASK = INPUTS.random(N) < 0.7
MASK.reshape(B, R)[:, 9:] = False  # whole chunks without a token: they are skipped
WEIGHTS = INPUTS.uniform(-1, 3, N)
TOP_K = {"top_1": 1, "top_5": 5, "top_60": 60}


def divergence_sums(
    name, student, head, teacher=TEACHER, teacher_head=TEACHER_HEAD, chunk=16, weights=WEIGHTS
):
    """In float32, of the positions in rows."""
    float32 = lambda array: jnp.asarray(array, jnp.float32)  # noqa: E731
    labels = TOKENS, float32(SAMPLER_LOGPROBS), float32(weights), MASK
    return losses.divergence_sums(
        divergences.choose("reverse_kl" if name in TOP_K else name, TOP_K.get(name, 0)),
        ENTRIES,
        chunk,
        None,
        float32(student).reshape(B, R, D),
        float32(head),
        float32(teacher).reshape(B, R, D),
        float32(teacher_head),
        *(jnp.asarray(array).reshape(B, R) for array in labels),
    )


@functools.cache
def chunked(name: str, chunk: int):
    """(sums, gradients with respect to student hidden states [N, D] and head) in float32."""

    def loss(student, head):
        sums = divergence_sums(name, student, head, chunk=chunk)
        return sums.divergence, sums

    gradients, sums = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(
        jnp.asarray(STUDENT, jnp.float32), jnp.asarray(STUDENT_HEAD, jnp.float32)
    )
    return sums, gradients


def brute_force(name: str):
    """(divergence per position, gradients of its weighted sum), dense, in float64."""

    def per_position(student, head):
        log_q = jax.nn.log_softmax(student @ head[:ENTRIES].T)
        log_p = jax.nn.log_softmax(jnp.asarray(TEACHER) @ jnp.asarray(TEACHER_HEAD)[:ENTRIES].T)
        q, p = jnp.exp(log_q), jnp.exp(log_p)
        m = (q + p) / 2
        terms = {
            "reverse_kl": q * (log_q - log_p),
            "forward_kl": p * (log_p - log_q),
            "jsd": (q * jnp.log(q / m) + p * jnp.log(p / m)) / 2,
            "nll": -log_q * (jnp.arange(ENTRIES) == TOKENS[:, None]),
        }
        if name not in TOP_K:
            return terms[name].sum(-1)
        kept = log_q >= jnp.sort(log_q, axis=-1)[:, -TOP_K[name], None]
        Q, P = (jnp.where(kept, 0, probs).sum(-1) for probs in (q, p))
        return jnp.where(kept, terms["reverse_kl"], 0).sum(-1) + Q * jnp.log(Q / P)

    with jax.enable_x64(True):
        student, head = jnp.asarray(STUDENT), jnp.asarray(STUDENT_HEAD)
        total = lambda *inputs: jnp.sum(per_position(*inputs) * MASK * WEIGHTS)  # noqa: E731
        gradients = jax.grad(total, argnums=(0, 1))(student, head)
        return np.asarray(per_position(student, head)), jax.tree.map(np.asarray, gradients)


@pytest.mark.parametrize("name", [*DIVERGENCE_NAMES, *TOP_K])
def test_value_and_gradient_match_float64(name):
    expected, expected_gradients = brute_force(name)
    assert expected[MASK].mean() >= 0.1
    sums, gradients = chunked(name, 16)
    assert float(sums.divergence) == pytest.approx((expected * WEIGHTS)[MASK].sum(), rel=1e-5)
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        assert relative_error(got, wanted) <= 1e-5


@pytest.mark.parametrize("name", DIVERGENCE_NAMES)
@pytest.mark.parametrize("chunk", [1, 7, 45, 64])
def test_chunk_size_changes_nothing(name, chunk):
    sums, gradients = chunked(name, chunk)
    reference, reference_gradients = chunked(name, 16)
    assert float(sums.divergence) == pytest.approx(float(reference.divergence), rel=1e-6)
    assert relative_error(gradients, reference_gradients) <= 1e-5


@pytest.mark.parametrize("name", [*DIVERGENCE_NAMES, "top_5"])
def test_blocks_of_the_vocabulary_change_nothing(name, monkeypatch):
    """130 entries in blocks of 48, which leave a rest; in one block everywhere else here."""
    _, expected = chunked(name, 16)
    monkeypatch.setattr(losses, "BLOCK", 48)
    _, gradients = chunked.__wrapped__(name, 16)
    assert relative_error(gradients, expected) <= 1e-5
    assert not jnp.array_equal(gradients[0], expected[0]), "summed in another order"


def test_logged_sums_match_float64():
    def log_softmax(hidden, head):
        logits = hidden @ head[:ENTRIES].T
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    log_q, log_p = log_softmax(STUDENT, STUDENT_HEAD), log_softmax(TEACHER, TEACHER_HEAD)
    gap = np.abs(log_q[np.arange(N), TOKENS] - SAMPLER_LOGPROBS)[MASK]
    sums, _ = chunked("reverse_kl", 16)
    for got, expected in (
        (sums.student_entropy, -(np.exp(log_q) * log_q).sum(-1)[MASK].sum()),
        (sums.teacher_entropy, -(np.exp(log_p) * log_p).sum(-1)[MASK].sum()),
        (sums.gap, gap.sum()),
        (sums.gap_max, gap.max()),
    ):
        assert float(got) == pytest.approx(expected, rel=1e-5)


def test_no_gradient_reaches_the_teacher():
    def loss(teacher, head):
        return divergence_sums("reverse_kl", STUDENT, STUDENT_HEAD, teacher, head).divergence

    gradients = jax.grad(loss, argnums=(0, 1))(
        jnp.asarray(TEACHER, jnp.float32), jnp.asarray(TEACHER_HEAD, jnp.float32)
    )
    assert all(not np.any(leaf) for leaf in gradients)


def test_masked_positions_and_rows_beyond_the_tokenizer_get_no_gradient():
    _, (hidden, head) = chunked("reverse_kl", 16)
    assert not np.any(np.asarray(hidden)[~MASK])
    assert np.all(np.any(np.asarray(hidden)[MASK], axis=1))
    assert not np.any(np.asarray(head)[ENTRIES:])


def test_reverse_and_forward_differ_and_swap_with_the_sides():
    def both_ways(name):
        sides = (STUDENT, STUDENT_HEAD, TEACHER, TEACHER_HEAD)
        there = divergence_sums(name, *sides, weights=np.ones(N)).divergence
        back = divergence_sums(name, *sides[2:], *sides[:2], weights=np.ones(N)).divergence
        return float(there), float(back)

    reverse, forward, symmetric = (both_ways(name) for name in ("reverse_kl", "forward_kl", "jsd"))
    assert reverse == pytest.approx(forward[::-1], rel=1e-6)
    assert abs(reverse[0] - reverse[1]) > 1e-4 * reverse[0]
    assert symmetric[0] == pytest.approx(symmetric[1], rel=1e-6)
    assert 0 < symmetric[0] < MASK.sum() * np.log(2)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd"])
def test_equal_sides_have_no_divergence_and_no_gradient(name):
    sides = (STUDENT, STUDENT_HEAD, STUDENT, STUDENT_HEAD)
    value, slopes = jax.value_and_grad(
        lambda head: divergence_sums(name, STUDENT, head, *sides[2:]).divergence
    )(jnp.asarray(STUDENT_HEAD, jnp.float32))
    assert abs(value) <= 1e-6
    assert np.abs(np.asarray(slopes)).max() <= 1e-6


def pair_of(student, teacher):
    """Of logits [C, V], as a chunk has it."""
    student, teacher = (x - x.max(axis=-1, keepdims=True) for x in (student, teacher))
    logits = [jnp.asarray(x, jnp.float32) for x in (student, teacher)]
    moments = divergences.moments(*logits), divergences.moments(*reversed(logits))
    return divergences.Pair(*logits, *moments, tokens=None, logprobs=None, add_up=lambda x: x)


@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_top_k_grows_with_k_to_the_full_divergence(spread):
    """Each further token splits the bucket, which never lowers a divergence."""
    V = 50
    pair = pair_of(*np.random.default_rng(1).normal(size=(2, 30, V)) * spread)
    full, _ = divergences.reverse_kl(pair)
    values = [divergences.top_k_reverse_kl(k, pair)[0] for k in (1, 2, 5, 20, V - 1, V, V + 9)]
    rounding = 1e-6 * (1 + np.abs(full))
    assert (np.diff(values, axis=0) >= -rounding).all()
    assert (values[0] >= -rounding).all()
    assert (values[0] < full - rounding).all()
    for whole in values[-2:]:
        np.testing.assert_allclose(whole, full, rtol=1e-6, atol=1e-6)


def test_top_k_where_float32_holds_no_mass_of_the_rest():
    """Logits up to 300 apart: finite, and never above the full divergence."""
    pair = pair_of(*np.random.default_rng(1).normal(size=(2, 30, 50)) * 60)
    full, _ = divergences.reverse_kl(pair)
    for k in (1, 5, 49):
        value, slopes = divergences.top_k_reverse_kl(k, pair)
        assert (value >= -1e-4).all()
        assert (value <= full * (1 + 1e-6)).all()
        assert np.isfinite(slopes(pair.student_CxV, pair.teacher_CxV, jnp.arange(50))).all()


def test_top_k_keeps_ties():
    """The second likeliest twice: k = 2 keeps both, as k = 3 does."""
    student = np.log([[0.5, 0.2, 0.2, 0.1]])
    pair = pair_of(student, np.log([[0.1, 0.2, 0.3, 0.4]]))
    one, two, three = (float(divergences.top_k_reverse_kl(k, pair)[0][0]) for k in (1, 2, 3))
    assert one < two == three


def test_no_array_of_tokens_by_vocabulary_exists():
    """Neither in the forward pass nor in the backward pass; [chunk, vocabulary] is the largest."""

    loss = lambda *arrays: divergence_sums("reverse_kl", *arrays, chunk=8).divergence  # noqa: E731
    gradient = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(jnp.zeros((N, D)), jnp.zeros((V, D)))
    shapes = set(shapes_within(gradient.jaxpr))
    assert (6, V) in shapes  # two positions of each row
    assert not [shape for shape in shapes if V in shape and np.prod(shape) >= N * V]


def test_every_configurable_divergence_exists():
    assert set(divergences.DIVERGENCES) == set(DIVERGENCE_NAMES)
