"""How the next token is drawn: temperature, top-k and top-p, and a random key for each sequence.

Shapes: B rows, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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
    scaled = logits_BxV / jnp.where(temperature > 0, temperature, 1.0)
    filtering = (jnp.asarray(sampling.top_p) < 1) | (jnp.asarray(sampling.top_k) > 0)
    scaled = jax.lax.cond(
        filtering, lambda x: keep_top(x, sampling.top_k, sampling.top_p), lambda x: x, scaled
    )
    token_keys = jax.vmap(jax.random.fold_in)(keys_B, jnp.broadcast_to(step, keys_B.shape))
    drawn = jax.vmap(jax.random.categorical)(token_keys, scaled)
    greedy = jnp.argmax(logits_BxV, axis=-1)
    return jnp.where(temperature > 0, drawn, greedy).astype(jnp.int32)


def keep_top(logits_BxV: jax.Array, top_k: int | jax.Array, top_p: float | jax.Array) -> jax.Array:
    """Sends the logits outside top-k, then outside top-p of what is left, to -inf.

    The most likely token always stays; tokens that tie with the last kept one stay too.
    """
    V = logits_BxV.shape[-1]
    descending = -jnp.sort(-logits_BxV, axis=-1)
    top_k = jnp.asarray(top_k)
    rank = jnp.arange(V)
    in_top_k = rank < jnp.where(top_k > 0, top_k, V)
    probs = jax.nn.softmax(jnp.where(in_top_k, descending, -jnp.inf), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    # In float32 the sum before a last small probability can round to 1.
    kept = in_top_k & ((before < top_p) | (rank == 0) | (jnp.asarray(top_p) >= 1))
    threshold = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BxV >= threshold, logits_BxV, -jnp.inf)
