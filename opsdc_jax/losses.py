"""Divergences between student and teacher over the full vocabulary, from hidden states.

No [tokens, vocabulary] array ever exists: response positions go through both heads in chunks, and a
chunk's gradients are formed while its logits exist, so the backward pass computes no logits again.

On a mesh each device holds V / devices rows of both heads, whatever the mesh, and forms the logits
of those. A chunk's hidden states are gathered, sums over the vocabulary are added up over the
devices, and the gradients of hidden states go back to where the rows are: logits never travel.

Shapes: B rows, R response positions, C positions of a chunk, of all rows together, D width
(student's and teacher's), V vocabulary; within a chunk B, R and V are a device's own part.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from opsdc_jax import sharding
from opsdc_jax.divergences import Divergence, Pair, Slopes, moments
from opsdc_jax.models.attention import MASKED

# Entries of the vocabulary whose slopes a CPU forms at a time, see `_add_gradients`.
BLOCK = 4096


class TokenSums(NamedTuple):
    """Float32 sums over response tokens (a maximum where it says so); divide by their number.

    Attributes:
      divergence: the loss, in nats, each position's times its weight.
      student_entropy, teacher_entropy: -sum_v p log p of each side, in nats.
      gap, gap_max: |sampler's - trainer's log-probability| of the sampled tokens, summed / maximum.
    """

    divergence: jax.Array
    student_entropy: jax.Array
    teacher_entropy: jax.Array
    gap: jax.Array
    gap_max: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def divergence_sums(
    divergence: Divergence,
    vocab_size: int,
    chunk_tokens: int,
    mesh: Mesh | None,
    student_BxRxD: jax.Array,
    student_head_VxD: jax.Array,
    teacher_BxRxD: jax.Array,
    teacher_head_VxD: jax.Array,
    tokens_BxR: jax.Array,
    logprobs_BxR: jax.Array,
    weights_BxR: jax.Array,
    mask_BxR: jax.Array,
) -> TokenSums:
    """Sums of a divergence and of the logged statistics over the positions in `mask_BxR`.

    Only `divergence` is differentiable, and only with respect to the student's hidden states and
    head; no gradient reaches the teacher. Matrix products take the hidden states' dtype and add up
    in float32.

    Args:
      divergence: one of opsdc_jax/divergences.py (`divergences.choose`).
      vocab_size: the tokenizer's entries; both sides are normalised over them.
      chunk_tokens: positions of a chunk, of all rows together; at least one of each row.
      mesh: where the arrays are, rows split over its batch axes; None is one device.
      tokens_BxR, logprobs_BxR: sampled ids and the sampler's log-probabilities of them.
      weights_BxR: float32, of each position in `divergence`; the other sums are plain ones.
      mask_BxR: True at response tokens; all else takes no part.
    """
    arrays = student_BxRxD, student_head_VxD, teacher_BxRxD, teacher_head_VxD
    labels = tokens_BxR, logprobs_BxR, weights_BxR, mask_BxR
    return _forward(divergence, vocab_size, chunk_tokens, mesh, *arrays, *labels)[0]


def _forward(
    divergence: Divergence,
    vocab_size: int,
    chunk_tokens: int,
    mesh: Mesh | None,
    student_BxRxD: jax.Array,
    student_head_VxD: jax.Array,
    teacher_BxRxD: jax.Array,
    teacher_head_VxD: jax.Array,
    *labels_BxR: jax.Array,
) -> tuple[TokenSums, tuple[jax.Array, jax.Array]]:
    """The sums, and the gradients of `divergence`: a scalar, so they only get scaled later."""
    # Cast here: before the heads are laid out anew, and once for all chunks.
    heads = (head.astype(student_BxRxD.dtype) for head in (student_head_VxD, teacher_head_VxD))
    inputs = (student_BxRxD, teacher_BxRxD, *labels_BxR)
    local = functools.partial(_local, divergence, vocab_size, chunk_tokens)
    if mesh is None or mesh.size == 1:
        sums, hidden_gradient, head_gradient = local((), (), *heads, *inputs)
    else:
        sums, hidden_gradient, head_gradient = _over_mesh(mesh, local, *heads, *inputs)
    return sums, (hidden_gradient, head_gradient.astype(student_head_VxD.dtype))


def _backward(
    divergence: Divergence,
    vocab_size: int,
    chunk_tokens: int,
    mesh: Mesh | None,
    gradients: tuple[jax.Array, jax.Array],
    cotangent: TokenSums,
) -> tuple:
    scale = cotangent.divergence
    hidden, head = (gradient * scale.astype(gradient.dtype) for gradient in gradients)
    return hidden, head, None, None, None, None, None, None


divergence_sums.defvjp(_forward, _backward)


def _over_mesh(
    mesh: Mesh,
    local: Callable,
    student_head_VxD: jax.Array,
    teacher_head_VxD: jax.Array,
    *inputs: jax.Array,
) -> tuple[TokenSums, jax.Array, jax.Array]:
    """Runs `_local` on every device of a mesh of several.

    The heads come split on D as parameters are. One all-to-all a micro-batch splits them on V
    instead, and one takes the gradient back: asked for by its shardings alone, the compiler would
    gather it whole on every device.
    """
    rows, embed = (sharding.TRAIN_RULES[name] for name in ("batch", "embed"))
    others = tuple(axis for axis in mesh.axis_names if axis != embed)
    V = student_head_VxD.shape[0]
    padding = ((0, -V % mesh.size), (0, 0))  # rows beyond the tokenizer: no part of anything

    def body(student_head: jax.Array, teacher_head: jax.Array, *inputs: jax.Array) -> tuple:
        heads = (
            jax.lax.all_to_all(head, embed, split_axis=0, concat_axis=1, tiled=True)
            for head in (student_head, teacher_head)
        )
        sums, hidden_gradient, head_gradient = local(rows, (*others, embed), *heads, *inputs)
        head_gradient = jax.lax.all_to_all(head_gradient, embed, 1, 0, tiled=True)
        return sums, hidden_gradient, head_gradient

    hidden, head, whole = PartitionSpec(rows), PartitionSpec(others, embed), PartitionSpec()
    sums, hidden_gradient, head_gradient = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(head, head, hidden, hidden, whole, whole, whole, whole),
        out_specs=(whole, hidden, head),
        check_vma=False,  # a carry that starts as zeros varies over no axis yet
    )(*(jnp.pad(x, padding) for x in (student_head_VxD, teacher_head_VxD)), *inputs)
    return sums, hidden_gradient, head_gradient[:V]


def _local(
    divergence: Divergence,
    vocab_size: int,
    chunk_tokens: int,
    row_axes: tuple[str, ...],
    vocab_axes: tuple[str, ...],
    student_head_VxD: jax.Array,
    teacher_head_VxD: jax.Array,
    student_BxRxD: jax.Array,
    teacher_BxRxD: jax.Array,
    *labels_BxR: jax.Array,
) -> tuple[TokenSums, jax.Array, jax.Array]:
    """One device's part: the sums, its rows' gradients [B, R, D], its head rows' [V, D].

    Args:
      row_axes, vocab_axes: mesh axes that rows and head are split over; none on one device.
      labels_BxR: tokens, log-probabilities, weights and mask, of the rows of all devices.
    """
    B, R, D = student_BxRxD.shape
    # Chunks run along R, so that rows stay where they are; of one width, and as few as can be.
    count = math.ceil(R / max(chunk_tokens // len(labels_BxR[0]), 1))
    width = math.ceil(R / count)
    V = student_head_VxD.shape[0]
    ids_V = jnp.arange(V) + (jax.lax.axis_index(vocab_axes) * V if vocab_axes else 0)
    other_axes = tuple(axis for axis in vocab_axes if axis not in row_axes)
    logits = functools.partial(_logits, ids_V=ids_V, vocab_size=vocab_size, split=bool(vocab_axes))

    def padded(array: jax.Array) -> jax.Array:
        widths = [(0, 0)] * array.ndim
        widths[1] = (0, count * width - R)
        return jnp.pad(array, widths)

    def gathered(hidden_BxCxD: jax.Array) -> jax.Array:
        if row_axes:
            hidden_BxCxD = jax.lax.all_gather(hidden_BxCxD, row_axes, axis=0, tiled=True)
        return hidden_BxCxD.reshape(-1, D)

    def scattered(gradient_CxD: jax.Array) -> jax.Array:
        """Adds up what each part of the vocabulary gives, and keeps this device's rows."""
        gradient = jax.lax.psum(gradient_CxD, other_axes).reshape(-1, width, D)
        if row_axes:
            gradient = jax.lax.psum_scatter(gradient, row_axes, scatter_dimension=0, tiled=True)
        return gradient

    def add(carry: tuple, start: jax.Array) -> tuple[tuple, jax.Array]:
        parts = [jax.lax.dynamic_slice_in_dim(array, start, width, axis=1) for array in arrays]
        # Beyond a micro-batch's longest response there is nothing to compute. The mask is whole on
        # every device, so all of them go the same way.
        return jax.lax.cond(jnp.any(parts[-1]), add_chunk, skip_chunk, carry, *parts)

    def skip_chunk(carry: tuple, student: jax.Array, *_: jax.Array) -> tuple[tuple, jax.Array]:
        return carry, jnp.zeros_like(student)

    def add_chunk(
        carry: tuple, student: jax.Array, teacher: jax.Array, *labels: jax.Array
    ) -> tuple[tuple, jax.Array]:
        sums, head_gradient = carry
        student_CxD = gathered(student)
        student_CxV = logits(student_CxD, student_head_VxD)
        teacher_CxV = logits(gathered(teacher), teacher_head_VxD)
        partial, slopes = _chunk(
            divergence,
            student_CxV,
            teacher_CxV,
            ids_V,
            vocab_axes,
            *(label.reshape(-1) for label in labels),
        )
        hidden_gradient, head_gradient = _add_gradients(
            slopes,
            head_gradient,
            student_CxV,
            teacher_CxV,
            ids_V,
            student_CxD,
            student_head_VxD,
        )
        carry = merge_sums(sums, partial), head_gradient
        return carry, scattered(hidden_gradient).astype(student_BxRxD.dtype)

    arrays = [padded(array) for array in (student_BxRxD, teacher_BxRxD, *labels_BxR)]
    carry = zero_sums(), jnp.zeros(student_head_VxD.shape, jnp.float32)
    (sums, head_gradient), hidden_gradient = jax.lax.scan(add, carry, jnp.arange(count) * width)
    hidden_gradient = jnp.moveaxis(hidden_gradient, 0, 1).reshape(B, count * width, D)
    return sums, hidden_gradient[:, :R], head_gradient


def _add_gradients(
    slopes: Slopes, head_gradient_VxD: jax.Array, *arrays: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A chunk's gradients: of its hidden states [C, D], and added to that of the head [V, D].

    Args:
      slopes: of `_chunk`: from logits as they are, not below their row's highest.
      arrays: logits of student and teacher [C, V], ids [V], the student's hidden states, its head.
    """

    def whole(
        head_gradient: jax.Array,
        student_CxW: jax.Array,
        teacher_CxW: jax.Array,
        ids_W: jax.Array,
        hidden_CxD: jax.Array,
        head_WxD: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        slopes_CxW = slopes(student_CxW, teacher_CxW, ids_W).astype(hidden_CxD.dtype)
        hidden_gradient = _product("cv,vd->cd", slopes_CxW, head_WxD)
        return hidden_gradient, head_gradient + _product("cv,cd->vd", slopes_CxW, hidden_CxD)

    def in_blocks(
        head_gradient: jax.Array,
        student_CxV: jax.Array,
        teacher_CxV: jax.Array,
        ids_V: jax.Array,
        hidden_CxD: jax.Array,
        head_VxD: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """A CPU would hold the slopes, and a product of the head's size beside the gradient."""

        def add(start: jax.Array | int, carry: tuple, width: int) -> tuple:
            hidden_gradient, head_gradient = carry
            rows = functools.partial(
                jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=width
            )
            more, block = whole(
                rows(head_gradient),
                rows(student_CxV, axis=1),
                rows(teacher_CxV, axis=1),
                rows(ids_V),
                hidden_CxD,
                rows(head_VxD),
            )
            head_gradient = jax.lax.dynamic_update_slice_in_dim(head_gradient, block, start, 0)
            return hidden_gradient + more, head_gradient

        width = min(BLOCK, len(head_VxD))
        blocks, rest = divmod(len(head_VxD), width)
        carry = jnp.zeros(hidden_CxD.shape, jnp.float32), head_gradient
        carry = jax.lax.fori_loop(0, blocks, lambda i, carry: add(i * width, carry, width), carry)
        return add(blocks * width, carry, rest) if rest else carry

    return jax.lax.platform_dependent(head_gradient_VxD, *arrays, cpu=in_blocks, default=whole)


def _product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)


def _logits(
    hidden_CxD: jax.Array,
    head_VxD: jax.Array,
    ids_V: jax.Array,
    vocab_size: int,
    split: bool,
) -> jax.Array:
    """Float32 logits [C, V]; -1e30 where the tokenizer has no such id (see `qwen3.logits`)."""
    logits_CxV = _product("cd,vd->cv", hidden_CxD, head_VxD)
    if split:
        return jnp.where(ids_V < vocab_size, logits_CxV, MASKED)
    # On one device these ids come last: written in place, where a CPU would keep both arrays.
    others = jnp.full((len(logits_CxV), max(len(ids_V) - vocab_size, 0)), MASKED)
    return jax.lax.dynamic_update_slice_in_dim(logits_CxV, others, vocab_size, axis=1)


def _chunk(
    divergence: Divergence,
    student_CxV: jax.Array,
    teacher_CxV: jax.Array,
    ids_V: jax.Array,
    vocab_axes: tuple[str, ...],
    tokens_C: jax.Array,
    logprobs_C: jax.Array,
    weights_C: jax.Array,
    mask_C: jax.Array,
) -> tuple[TokenSums, Slopes]:
    """One chunk's sums, and the slopes of its weighted divergence, from logits as they are."""
    student_top, teacher_top = (
        jax.lax.pmax(jnp.max(logits, axis=-1), vocab_axes)[:, None]
        for logits in (student_CxV, teacher_CxV)
    )
    student_CxV, teacher_CxV = student_CxV - student_top, teacher_CxV - teacher_top
    add_up = functools.partial(jax.lax.psum, axis_name=vocab_axes)
    student, teacher = add_up(
        (moments(student_CxV, teacher_CxV), moments(teacher_CxV, student_CxV))
    )
    column_C = tokens_C - ids_V[0]
    here_C = (column_C >= 0) & (column_C < len(ids_V))  # ids of other devices' rows give zero
    logit_C = jnp.take_along_axis(student_CxV, column_C[:, None], axis=-1, mode="clip")[:, 0]
    logprob_C = add_up(jnp.where(here_C, logit_C, 0.0)) - jnp.log(student.total)
    pair = Pair(student_CxV, teacher_CxV, student, teacher, tokens_C, logprob_C, add_up)
    divergence_C, slopes = divergence(pair)

    def total(values_C: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mask_C, values_C, 0.0))

    gap_C = jnp.where(mask_C, jnp.abs(logprob_C - logprobs_C), 0.0)
    sums = TokenSums(
        divergence=total(divergence_C * weights_C),
        student_entropy=total(student.entropy),
        teacher_entropy=total(teacher.entropy),
        gap=jnp.sum(gap_C),
        gap_max=jnp.max(gap_C),
    )

    def weighted(student: jax.Array, teacher: jax.Array, ids_W: jax.Array) -> jax.Array:
        # Shifted here once more: only the logits as they came lie in memory.
        slopes_CxW = slopes(student - student_top, teacher - teacher_top, ids_W)
        return jnp.where(mask_C[:, None], slopes_CxW * weights_C[:, None], 0.0)

    return sums, weighted


def zero_sums() -> TokenSums:
    """Sums over no tokens."""
    return TokenSums(*(jnp.zeros((), jnp.float32) for _ in TokenSums._fields))


def merge_sums(left: TokenSums, right: TokenSums) -> TokenSums:
    """Sums over the tokens of both."""
    added = jax.tree.map(jnp.add, left, right)
    return added._replace(gap_max=jnp.maximum(left.gap_max, right.gap_max))
