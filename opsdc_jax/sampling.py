"""How the next token is drawn: temperature, top-k and top-p, and a random key for each sequence.

Shapes: B rows, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from opsdc_jax import threefry

# Separate uses of one seed.
TRAIN_STREAM, EVAL_STREAM = 0, 1


class SamplingParams(NamedTuple):
    """Traced sampling parameters: changing one compiles nothing.

    Attributes:
      temperature: divides the logits; 0 is greedy decoding.
      top_p: keeps the smallest set of tokens with at least this probability; 1 keeps all.
      top_k: keeps the k most likely tokens; 0 keeps all.
      max_tokens: budget of the response, at most the static response width.
    """

    temperature: float | jax.Array = 1.0
    top_p: float | jax.Array = 1.0
    top_k: int | jax.Array = 0
    max_tokens: int | jax.Array = 2**30


def sequence_keys(
    seed: int, stream: int, step: int | np.ndarray, examples: np.ndarray
) -> jax.Array:
    """One key per sequence, [B], a pure function of (seed, stream, step, example).

    Args:
      stream: `TRAIN_STREAM` or `EVAL_STREAM`.
      step: of training; of an evaluation the numbers of the samples, [B].
      examples: [B] integers naming the sequences, whatever their place in the batch.
    """
    steps = np.broadcast_to(step, examples.shape)
    return _sequence_keys(*jax.device_put((seed, stream, steps, examples)))


@jax.jit
def _sequence_keys(
    seed: jax.Array, stream: jax.Array, steps_B: jax.Array, examples_B: jax.Array
) -> jax.Array:
    def sequence_key(step: jax.Array, example: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(key, step), example)

    key = jax.random.fold_in(jax.random.key(seed), stream)
    return jax.vmap(sequence_key)(steps_B, examples_B)


def draw(
    logits_BxV: jax.Array, keys_B: jax.Array, step: jax.Array, sampling: SamplingParams
) -> jax.Array:
    """One token id per row: the argmax at temperature 0, else drawn with fold_in(key, step).

    Args:
      step: number of the token within its response; one for all rows, or [B].
    """
    temperature = jnp.asarray(sampling.temperature, jnp.float32)

    def drawn() -> jax.Array:
        scaled_BxV = logits_BxV / temperature
        filtering = (jnp.asarray(sampling.top_p) < 1) | (jnp.asarray(sampling.top_k) > 0)
        scaled_BxV = jax.lax.cond(
            filtering,
            lambda x_BxV: keep_top(x_BxV, sampling.top_k, sampling.top_p),
            lambda x_BxV: x_BxV,
            scaled_BxV,
        )
        steps_B = jnp.broadcast_to(step, keys_B.shape)
        token_keys_B = jax.vmap(jax.random.fold_in)(threefry.unrolled(keys_B), steps_B)
        width, dtype = scaled_BxV.shape[1:], scaled_BxV.dtype
        gumbels_BxV = jax.vmap(lambda key: jax.random.gumbel(key, width, dtype))(token_keys_B)
        return _argmax(jax.lax.optimization_barrier(scaled_BxV + gumbels_BxV))

    return jax.lax.cond(temperature > 0, drawn, lambda: _argmax(logits_BxV))


def _argmax(values_BxV: jax.Array) -> jax.Array:
    """As `jnp.argmax`, [B]; in two reductions that XLA vectorises on a CPU, which it does not."""
    V = values_BxV.shape[-1]
    is_highest_BxV = values_BxV == jnp.max(values_BxV, axis=-1, keepdims=True)
    first_B = jnp.min(jnp.where(is_highest_BxV, jnp.arange(V), V), axis=-1)
    return jnp.minimum(first_B, V - 1)  # where a value is not a number, none is the highest


def log_probability(logits_BxV: jax.Array, token_B: jax.Array) -> jax.Array:
    """Of one token in each row, [B]; the log-probabilities of all others are never formed."""
    chosen_B = jnp.take_along_axis(logits_BxV, token_B[:, None], axis=-1)[:, 0]
    return chosen_B - jax.nn.logsumexp(logits_BxV, axis=-1)


def keep_top(logits_BxV: jax.Array, top_k: int | jax.Array, top_p: float | jax.Array) -> jax.Array:
    """Sends the logits outside top-k, then outside top-p of what is left, to -inf.

    The most likely token always stays; tokens that tie with the last kept one stay too.

    Nothing is sorted. A logit is among the top k if fewer than k are higher, and in top-p if those
    higher have less than p of the mass. Both only grow as one goes down, so the lowest logit that
    stays is found by bisection, in passes over [B, V] that give one number a row: over a mesh that
    splits the vocabulary, only these are exchanged.
    """
    top_k, top_p = jnp.asarray(top_k), jnp.asarray(top_p, jnp.float32)
    V = logits_BxV.shape[-1]
    k = jnp.where(top_k > 0, jnp.minimum(top_k, V), V)
    order_BxV = ordered(logits_BxV)
    highest_B = jnp.max(order_BxV, axis=-1)
    masses_BxV = jnp.exp(logits_BxV - jnp.max(logits_BxV, axis=-1, keepdims=True))

    def higher(values_BxV: jax.Array | int, bound_B: jax.Array) -> jax.Array:
        """The sum of what belongs to logits above a bound, [B]."""
        return jnp.sum(jnp.where(order_BxV > bound_B[:, None], values_BxV, 0), axis=-1)

    lowest_B = jnp.min(order_BxV, axis=-1)
    kth_B = jax.lax.cond(
        k < V,
        lambda: least(lambda bound_B: higher(1, bound_B) < k, lowest_B, highest_B),
        lambda: lowest_B,
    )

    def within_top_p() -> jax.Array:
        # Of those that tie at the k-th place, as many have a share in the whole as make it k.
        ties_B = k - higher(1, kth_B)
        tied_B = jnp.max(jnp.where(order_BxV == kth_B[:, None], masses_BxV, 0), axis=-1)
        whole_B = higher(masses_BxV, kth_B) + ties_B * tied_B
        return least(
            lambda bound_B: higher(masses_BxV, bound_B) < top_p * whole_B, kth_B, highest_B
        )

    last_B = jax.lax.cond(top_p < 1, within_top_p, lambda: kth_B)
    return jnp.where(order_BxV >= last_B[:, None], logits_BxV, -jnp.inf)


def ordered(values: jax.Array) -> jax.Array:
    """Integers in the order of float32 values; -0 is 0."""
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    return jnp.where(bits < 0, -(bits & (2**31 - 1)), bits)


def least(
    holds: Callable[[jax.Array], jax.Array], low_B: jax.Array, high_B: jax.Array
) -> jax.Array:
    """In each row the least integer from `low_B` on for which `holds`; else `high_B`.

    Args:
      holds: [B] -> [B]; where it holds, it does for all above.
    """

    def halve(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B, high_B = bounds
        middle_B = (low_B & high_B) + ((low_B ^ high_B) >> 1)  # their mean, without overflow
        holds_B = holds(middle_B)
        return jnp.where(holds_B, low_B, middle_B + 1), jnp.where(holds_B, middle_B, high_B)

    def apart(bounds: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.any(bounds[0] < bounds[1])

    return jax.lax.while_loop(apart, halve, (low_B, high_B))[1]
