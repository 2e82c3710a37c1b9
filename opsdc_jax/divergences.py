"""The divergences between student and teacher, and what stands in their place, of a chunk's logits.

Shapes: C positions, V entries of the vocabulary, a device's own part of it.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from opsdc_jax.sampling import least, ordered


class Moments(NamedTuple):
    """Sums over the vocabulary with the weights w = exp(logits - highest) of one side, each [C].

    Attributes:
      total: sum of w.
      own: sum of w * (logits - highest).
      gap: sum of w * (this side's logits - the other's, each below its highest).
    """

    total: jax.Array
    own: jax.Array
    gap: jax.Array

    @property
    def entropy(self) -> jax.Array:
        return jnp.log(self.total) - self.own / self.total


class Pair(NamedTuple):
    """A chunk's logits of student (q) and teacher (p), each below its row's highest.

    Attributes:
      student_CxV, teacher_CxV: float32.
      student, teacher: their moments over the whole vocabulary.
      tokens, logprobs: ids of the sampled tokens, and the student's log-probabilities of them, [C].
      add_up: adds a [C] sum over the own part of the vocabulary up over the devices.
    """

    student_CxV: jax.Array
    teacher_CxV: jax.Array
    student: Moments
    teacher: Moments
    tokens: jax.Array
    logprobs: jax.Array
    add_up: Callable[[jax.Array], jax.Array]


# From logits of student and teacher, [C, W] of any part of the vocabulary, each below its row's
# highest, and the ids [W] of that part: the slopes of the divergence by the student's, [C, W].
Slopes = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Divergence = Callable[[Pair], tuple[jax.Array, Slopes]]


def reverse_kl(pair: Pair) -> tuple[jax.Array, Slopes]:
    """KL(q || p) = sum_v q (log q - log p), the loss of OPSDC; [C], and its slopes.

    With d = student's - teacher's logits, the slope with respect to a student's logit is
    q (log q - log p - KL) = q (d - sum_v q d): the normalisers cancel.
    """
    mean_gap = pair.student.gap / pair.student.total
    log_ratio = jnp.log(pair.teacher.total / pair.student.total)

    def slopes(student: jax.Array, teacher: jax.Array, _: jax.Array) -> jax.Array:
        q = jnp.exp(student) / pair.student.total[:, None]
        return q * (student - teacher - mean_gap[:, None])

    return mean_gap + log_ratio, slopes


def top_k_reverse_kl(k: int, pair: Pair) -> tuple[jax.Array, Slopes]:
    """Reverse KL over the student's k likeliest tokens and one bucket for all others, [C].

    With K these tokens, and Q and P the probabilities of the others under student and teacher, it
    is sum_{v in K} q log(q / p) + Q log(Q / P): the KL of the two coarser distributions, so never
    above the full one, and the same where k covers the vocabulary. Without its bucket it could be
    negative, and would be least where all of the mass is outside of K.

    The slopes are q (log(q / p) - KL) in K, q (log(Q / P) - KL) outside. Tokens that tie with the
    k-th are in K too. K is taken as given: where the k-th token changes, the value jumps.
    """
    order_CxV = ordered(pair.student_CxV)
    C = order_CxV.shape[0]
    # Of any float32 from -inf to the highest logit, which is 0 here.
    lowest, highest = ordered(jnp.array([-jnp.inf, 0.0]))

    def few_higher(bound_C: jax.Array) -> jax.Array:
        return pair.add_up(jnp.sum(order_CxV > bound_C[:, None], axis=-1)) < k

    kth_C = least(few_higher, jnp.broadcast_to(lowest, C), jnp.broadcast_to(highest, C))

    def is_kept(student: jax.Array) -> jax.Array:
        return ordered(student) >= kth_C[:, None]

    kept_CxV, q_CxV = is_kept(pair.student_CxV), jnp.exp(pair.student_CxV)
    parts = (
        jnp.where(kept_CxV, q_CxV * (pair.student_CxV - pair.teacher_CxV), 0.0),
        jnp.where(kept_CxV, 0.0, q_CxV),
        jnp.where(kept_CxV, 0.0, jnp.exp(pair.teacher_CxV)),
    )
    # Summed as they are: the rest as 1 minus the kept would be rounding error.
    kept_gap, student_rest, teacher_rest = (pair.add_up(jnp.sum(x, axis=-1)) for x in parts)
    # A rest may have no mass, or less than float32 can hold.
    floor = jnp.finfo(jnp.float32).tiny
    rest_gap = jnp.log(jnp.maximum(student_rest, floor)) - jnp.log(jnp.maximum(teacher_rest, floor))
    # As in reverse_kl, with the bucket's one gap in place of each gap inside it.
    mean_gap = (kept_gap + student_rest * rest_gap) / pair.student.total
    log_ratio = jnp.log(pair.teacher.total / pair.student.total)

    def slopes(student: jax.Array, teacher: jax.Array, _: jax.Array) -> jax.Array:
        q = jnp.exp(student) / pair.student.total[:, None]
        gap = jnp.where(is_kept(student), student - teacher, rest_gap[:, None])
        return q * (gap - mean_gap[:, None])

    return mean_gap + log_ratio, slopes


def forward_kl(pair: Pair) -> tuple[jax.Array, Slopes]:
    """KL(p || q) = sum_v p (log p - log q), [C]; and its slopes q - p."""
    log_ratio = jnp.log(pair.student.total / pair.teacher.total)

    def slopes(student: jax.Array, teacher: jax.Array, _: jax.Array) -> jax.Array:
        q = jnp.exp(student) / pair.student.total[:, None]
        return q - jnp.exp(teacher) / pair.teacher.total[:, None]

    return pair.teacher.gap / pair.teacher.total + log_ratio, slopes


def jsd(pair: Pair) -> tuple[jax.Array, Slopes]:
    """Jensen-Shannon divergence (KL(q || m) + KL(p || m)) / 2 with m = (q + p) / 2, [C].

    The slopes are q (log(q / m) - KL(q || m)) / 2.
    """
    log_ratio = jnp.log(pair.student.total / pair.teacher.total)[:, None]

    def terms(student: jax.Array, teacher: jax.Array) -> tuple[jax.Array, ...]:
        """The probabilities q, and log(q / m) and log(p / q)."""
        log_p_over_q = teacher - student + log_ratio
        log_q_over_m = jnp.log(2.0) - jax.nn.softplus(log_p_over_q)
        return jnp.exp(student) / pair.student.total[:, None], log_q_over_m, log_p_over_q

    q, log_q_over_m, log_p_over_q = terms(pair.student_CxV, pair.teacher_CxV)
    p = jnp.exp(pair.teacher_CxV) / pair.teacher.total[:, None]
    from_q = pair.add_up(jnp.sum(q * log_q_over_m, axis=-1))
    from_p = pair.add_up(jnp.sum(p * (log_q_over_m + log_p_over_q), axis=-1))

    def slopes(student: jax.Array, teacher: jax.Array, _: jax.Array) -> jax.Array:
        q, log_q_over_m, _ = terms(student, teacher)
        return 0.5 * q * (log_q_over_m - from_q[:, None])

    return 0.5 * (from_q + from_p), slopes


def nll(pair: Pair) -> tuple[jax.Array, Slopes]:
    """-log q of the sampled token, [C], for the baselines; its slopes are q, less 1 at that token.

    The teacher plays no part. On the teacher's samples it is supervised fine-tuning; with
    advantages as weights, on the student's own, its gradient is the policy gradient.
    """

    def slopes(student: jax.Array, _: jax.Array, ids_W: jax.Array) -> jax.Array:
        q = jnp.exp(student) / pair.student.total[:, None]
        return q - (pair.tokens[:, None] == ids_W)

    return -pair.logprobs, slopes


DIVERGENCES: dict[str, Divergence] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd,
    "nll": nll,
}


def choose(name: str, top_k: int) -> Divergence:
    """A divergence by its name; with `top_k`, the reverse KL over so many tokens and the rest."""
    return functools.partial(top_k_reverse_kl, top_k) if top_k else DIVERGENCES[name]


def moments(own_CxV: jax.Array, other_CxV: jax.Array) -> Moments:
    """Moments over this device's part of the vocabulary, in one pass over the logits."""

    def terms(own: jax.Array, other: jax.Array) -> tuple[jax.Array, ...]:
        weights = jnp.exp(own)
        return weights, weights * own, weights * (own - other)

    def plain(own: jax.Array, other: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jnp.sum(term, axis=-1) for term in terms(own, other))

    def grouped(own: jax.Array, other: jax.Array) -> tuple[jax.Array, ...]:
        """A CPU takes one pass a sum, unless told. Told, it adds one by one: so only short runs."""
        C, V = own.shape
        shape = C, -1, math.gcd(V, 128)
        sums = jax.lax.reduce(
            terms(own.reshape(shape), other.reshape(shape)),
            (0.0, 0.0, 0.0),
            lambda left, right: tuple(map(jnp.add, left, right)),
            (2,),
        )
        return tuple(jnp.sum(part, axis=-1) for part in sums)

    return Moments(*jax.lax.platform_dependent(own_CxV, other_CxV, cpu=grouped, default=plain))
