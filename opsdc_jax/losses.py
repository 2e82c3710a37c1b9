"""Divergences between student and teacher over the full vocabulary, from hidden states.

No [tokens, vocabulary] array ever exists: tokens go through both heads in chunks, and a chunk's
gradients are formed while its logits exist, so the backward pass computes no logits again.

Shapes: N response positions, C chunk, D width (student's and teacher's), V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from opsdc_jax.models import qwen3

LogProbs = jax.Array


class TokenSums(NamedTuple):
    """Float32 sums over response tokens (a maximum where it says so); divide by their number.

    Attributes:
      divergence: the loss, in nats.
      student_entropy, teacher_entropy: -sum_v p log p of each side, in nats.
      gap, gap_max: |sampler's - trainer's log-probability| of the sampled tokens, summed / maximum.
    """

    divergence: jax.Array
    student_entropy: jax.Array
    teacher_entropy: jax.Array
    gap: jax.Array
    gap_max: jax.Array


def reverse_kl(log_q: LogProbs, log_p: LogProbs) -> jax.Array:
    """KL(q || p) = sum_v q (log q - log p): the loss of OPSDC. q is the student, p the teacher."""
    return jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)


def forward_kl(log_q: LogProbs, log_p: LogProbs) -> jax.Array:
    """KL(p || q) = sum_v p (log p - log q)."""
    return reverse_kl(log_p, log_q)


def jsd(log_q: LogProbs, log_p: LogProbs) -> jax.Array:
    """Jensen-Shannon divergence: (KL(q || m) + KL(p || m)) / 2 with m = (q + p) / 2."""
    log_m = jnp.logaddexp(log_q, log_p) - jnp.log(2.0)
    return 0.5 * (reverse_kl(log_q, log_m) + reverse_kl(log_p, log_m))


def log_probs(hidden: jax.Array, head_VxD: jax.Array, vocab_size: int) -> LogProbs:
    """Float32 log-probabilities [..., V], normalised over the tokenizer's `vocab_size` entries."""
    return jax.nn.log_softmax(qwen3.logits(hidden, head_VxD, vocab_size), axis=-1)


def entropy(log_p: LogProbs) -> jax.Array:
    """-sum_v p log p, in nats."""
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


DIVERGENCES: dict[str, Callable[[LogProbs, LogProbs], jax.Array]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd,
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def divergence_sums(
    name: str,
    vocab_size: int,
    chunk: int,
    student_NxD: jax.Array,
    student_head_VxD: jax.Array,
    teacher_NxD: jax.Array,
    teacher_head_VxD: jax.Array,
    tokens_N: jax.Array,
    logprobs_N: jax.Array,
    mask_N: jax.Array,
) -> TokenSums:
    """Sums of a divergence and of the logged statistics over the positions in `mask_N`.

    Only `divergence` is differentiable, and only with respect to the student's hidden states and
    head; no gradient reaches the teacher.

    Args:
      name: a key of `DIVERGENCES`.
      vocab_size: the tokenizer's entries; both sides are normalised over them.
      chunk: positions per chunk.
      tokens_N, logprobs_N: sampled ids and the sampler's log-probabilities of them.
      mask_N: True at response tokens; all else takes no part.
    """
    inputs = (student_NxD, teacher_NxD, tokens_N, logprobs_N, mask_N)

    def add(sums: TokenSums, part: tuple[jax.Array, ...]) -> tuple[TokenSums, None]:
        _, partial = _chunk_sums(
            part[0], student_head_VxD, teacher_head_VxD, part[1:], name, vocab_size
        )
        return merge_sums(sums, partial), None

    sums, _ = jax.lax.scan(add, zero_sums(), in_chunks(inputs, chunk))
    return sums


def _forward(
    name: str,
    vocab_size: int,
    chunk: int,
    student_NxD: jax.Array,
    student_head_VxD: jax.Array,
    teacher_NxD: jax.Array,
    teacher_head_VxD: jax.Array,
    tokens_N: jax.Array,
    logprobs_N: jax.Array,
    mask_N: jax.Array,
) -> tuple[TokenSums, tuple[jax.Array, jax.Array]]:
    """The sums, and the gradients of `divergence`: a scalar, so they only get scaled later."""
    inputs = (student_NxD, teacher_NxD, tokens_N, logprobs_N, mask_N)
    gradient = jax.grad(_chunk_sums, argnums=(0, 1), has_aux=True)

    def add(carry: tuple, part: tuple[jax.Array, ...]) -> tuple[tuple, jax.Array]:
        sums, head_gradient = carry
        (hidden_gradient, chunk_head_gradient), partial = gradient(
            part[0], student_head_VxD, teacher_head_VxD, part[1:], name, vocab_size
        )
        carry = merge_sums(sums, partial), head_gradient + chunk_head_gradient.astype(jnp.float32)
        return carry, hidden_gradient

    zeros = jnp.zeros(student_head_VxD.shape, jnp.float32)
    (sums, head_gradient), hidden_gradient = jax.lax.scan(
        add, (zero_sums(), zeros), in_chunks(inputs, chunk)
    )
    hidden_gradient = hidden_gradient.reshape(-1, student_NxD.shape[1])[: student_NxD.shape[0]]
    return sums, (hidden_gradient, head_gradient.astype(student_head_VxD.dtype))


def _backward(
    name: str,
    vocab_size: int,
    chunk: int,
    gradients: tuple[jax.Array, jax.Array],
    cotangent: TokenSums,
) -> tuple:
    scale = cotangent.divergence
    hidden, head = (gradient * scale.astype(gradient.dtype) for gradient in gradients)
    return hidden, head, None, None, None, None, None


divergence_sums.defvjp(_forward, _backward)


def _chunk_sums(
    student_CxD: jax.Array,
    student_head_VxD: jax.Array,
    teacher_head_VxD: jax.Array,
    rest: tuple[jax.Array, ...],
    name: str,
    vocab_size: int,
) -> tuple[jax.Array, TokenSums]:
    """One chunk: its summed divergence (to differentiate) and all sums (to log)."""
    teacher_CxD, tokens_C, logprobs_C, mask_C = rest
    log_q = log_probs(student_CxD, student_head_VxD, vocab_size)
    log_p = jax.lax.stop_gradient(log_probs(teacher_CxD, teacher_head_VxD, vocab_size))
    divergence = jnp.sum(jnp.where(mask_C, DIVERGENCES[name](log_q, log_p), 0.0))

    def total(values_C: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mask_C, values_C, 0.0))

    log_q_detached = jax.lax.stop_gradient(log_q)
    sampled_C = jnp.take_along_axis(log_q_detached, tokens_C[:, None], axis=-1)[:, 0]
    gap_C = jnp.where(mask_C, jnp.abs(sampled_C - logprobs_C), 0.0)
    return divergence, TokenSums(
        divergence=jax.lax.stop_gradient(divergence),
        student_entropy=total(entropy(log_q_detached)),
        teacher_entropy=total(entropy(log_p)),
        gap=jnp.sum(gap_C),
        gap_max=jnp.max(gap_C),
    )


def zero_sums() -> TokenSums:
    """Sums over no tokens."""
    return TokenSums(*(jnp.zeros((), jnp.float32) for _ in TokenSums._fields))


def merge_sums(left: TokenSums, right: TokenSums) -> TokenSums:
    """Sums over the tokens of both."""
    added = jax.tree.map(jnp.add, left, right)
    return added._replace(gap_max=jnp.maximum(left.gap_max, right.gap_max))


def in_chunks(inputs: tuple[jax.Array, ...], chunk: int) -> tuple[jax.Array, ...]:
    """[N, ...] -> [chunks, C, ...], padded with zeros (the mask's padding is False)."""
    chunk = min(chunk, inputs[0].shape[0])

    def split(leaf: jax.Array) -> jax.Array:
        missing = -leaf.shape[0] % chunk
        padded = jnp.pad(leaf, ((0, missing), *((0, 0) for _ in leaf.shape[1:])))
        return padded.reshape(-1, chunk, *leaf.shape[1:])

    return jax.tree.map(split, inputs)
