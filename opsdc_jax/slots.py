"""Decoding on the devices: rows ("slots") that each hold a response under way.

A slot's cache is a ring. All rows write the keys and values of their newest token into the same
`column`, which goes round, and a row attends to as many columns behind it as its context has
tokens: so rows of any age decode side by side, one slice is written for all of them, and a slot is
refilled by laying the next prompt where it ends before that column. Keys carry their rotation
already, so attention does not care where in the ring they lie.

`sampler.generate` runs all of this in one program. `continuous` runs it in pieces: the jitted
functions below, between which slots are refilled and the ring grows or shrinks.

Shapes: B slots, M prompts prefilled together, P prompt width, W buffer width, S columns of the
ring, N key/value heads, K head width, D model width, V vocabulary.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from opsdc_jax import sharding
from opsdc_jax.models import decode, qwen3
from opsdc_jax.models.layers import COLUMNS, KVCache, Qwen3Config
from opsdc_jax.prefill import Prefilled
from opsdc_jax.rollout import Array
from opsdc_jax.sampling import SamplingParams, draw, log_probability


class Rules(NamedTuple):
    """How tokens are drawn and where responses end: the same for all rows, traced.

    Attributes:
      sampling: temperature, top-p, top-k, budget.
      stop_ids: ids that end a response; the one sampled is kept.
    """

    sampling: SamplingParams
    stop_ids: jax.Array | np.ndarray


class Slots(NamedTuple):
    """The state of decoding.

    Attributes:
      column: where the next keys and values are written.
      step: tokens for which the buffers are filled.
      token_B: the newest token, whose keys and values are still to be written.
      done_B: the response has ended, or there is none.
      stopped_B: it ended by a stop id, not by the budget.
      prompts_B, lengths_B: tokens of the prompt, and of the response so far.
      keys_B: see `sampling.sequence_keys`.
      tokens_BxW, logprobs_BxW: what was drawn in each step; where a row drew none, what was there.
      caches: one of S columns per layer.
    """

    column: jax.Array
    step: jax.Array
    token_B: jax.Array
    done_B: jax.Array
    stopped_B: jax.Array
    prompts_B: jax.Array
    lengths_B: jax.Array
    keys_B: jax.Array
    tokens_BxW: jax.Array
    logprobs_BxW: jax.Array
    caches: list[KVCache]


class Refill(NamedTuple):
    """Which slots take a new response.

    Attributes:
      starts: how many.
      slots_B: their numbers, in the first `starts` places.
      fresh_B: whether a slot is among them.
      sources_B: of these, the row of the prompt in `Prefilled`.
      prompts_B: its tokens.
      keys_BxU: `jax.random.key_data` of the response's key, U words.
    """

    starts: Array
    slots_B: Array
    fresh_B: Array
    sources_B: Array
    prompts_B: Array
    keys_BxU: Array


class View(NamedTuple):
    """What the host reads after a segment, whole on every device; see `Slots`."""

    done_B: Array
    stopped_B: Array
    lengths_B: Array
    tokens_BxW: Array
    logprobs_BxW: Array


def fresh(caches: list[KVCache], column: int, rows: int, width: int) -> Slots:
    """Slots without a response; `start` gives them one."""
    return Slots(
        column=jnp.int32(column),
        step=jnp.int32(0),
        token_B=jnp.zeros((rows,), jnp.int32),
        done_B=jnp.ones((rows,), bool),
        stopped_B=jnp.zeros((rows,), bool),
        prompts_B=jnp.ones((rows,), jnp.int32),
        lengths_B=jnp.zeros((rows,), jnp.int32),
        keys_B=jnp.broadcast_to(jax.random.key(0), (rows,)),
        tokens_BxW=jnp.zeros((rows, width), jnp.int32),
        logprobs_BxW=jnp.zeros((rows, width), jnp.float32),
        caches=caches,
    )


def start(
    slots: Slots,
    rules: Rules,
    fresh_B: jax.Array,
    prompts_B: jax.Array,
    keys_B: jax.Array,
    hidden_BxD: jax.Array,
    head_VxD: jax.Array,
    vocab_size: int,
) -> Slots:
    """Gives slots whose caches hold a prompt their new response, and draws its first token."""
    slots = slots._replace(
        step=jnp.int32(0),
        done_B=slots.done_B & ~fresh_B,
        stopped_B=slots.stopped_B & ~fresh_B,
        prompts_B=jnp.where(fresh_B, prompts_B, slots.prompts_B),
        lengths_B=jnp.where(fresh_B, 0, slots.lengths_B),
        keys_B=jnp.where(fresh_B, keys_B, slots.keys_B),
    )
    return append(slots, rules, fresh_B, hidden_BxD, head_VxD, vocab_size)


def append(
    slots: Slots,
    rules: Rules,
    active_B: jax.Array,
    hidden_BxD: jax.Array,
    head_VxD: jax.Array,
    vocab_size: int,
) -> Slots:
    """Draws the next token of the active rows."""
    logits_BxV = decode.logits(hidden_BxD, head_VxD, vocab_size)
    drawn_B = draw(logits_BxV, slots.keys_B, slots.lengths_B, rules.sampling)
    logprob_B = log_probability(logits_BxV, drawn_B)
    lengths_B = slots.lengths_B + active_B.astype(jnp.int32)
    stops_B = active_B & jnp.isin(drawn_B, rules.stop_ids)
    spent_B = active_B & (lengths_B >= rules.sampling.max_tokens)

    def put(buffer_BxW: jax.Array, new_B: jax.Array) -> jax.Array:
        old_Bx1 = jax.lax.dynamic_slice_in_dim(buffer_BxW, slots.step, 1, axis=1)
        column = jnp.where(active_B[:, None], new_B[:, None], old_Bx1)
        return jax.lax.dynamic_update_slice_in_dim(buffer_BxW, column, slots.step, axis=1)

    return slots._replace(
        step=slots.step + 1,
        token_B=jnp.where(active_B, drawn_B, slots.token_B),
        done_B=slots.done_B | stops_B | spent_B,
        stopped_B=slots.stopped_B | stops_B,
        lengths_B=lengths_B,
        tokens_BxW=put(slots.tokens_BxW, drawn_B),
        logprobs_BxW=put(slots.logprobs_BxW, logprob_B),
    )


def decode_until_done(
    weights: decode.Weights,
    config: Qwen3Config,
    slots: Slots,
    rules: Rules,
    vocab_size: int,
    width: int,
) -> Slots:
    """Draws tokens until all rows are done, or `width` columns of the buffers are full."""
    S = columns_of(slots.caches[0])
    head_VxD = qwen3.unembedding(weights.params)

    Tables = tuple[jax.Array, ...]

    def newest(slots: Slots) -> Tables:
        """Of the newest tokens, at the ends of their contexts."""
        return decode.token_tables(config, slots.prompts_B + slots.lengths_B - 1)

    def unfinished(carried: tuple[Slots, Tables]) -> jax.Array:
        slots, _ = carried
        return (slots.step < width) & ~jnp.all(slots.done_B)

    def body(carried: tuple[Slots, Tables]) -> tuple[Slots, Tables]:
        slots, tables = carried
        context_B = slots.prompts_B + slots.lengths_B  # the newest token, written now, included
        age_S = (slots.column - jnp.arange(S)) % S
        hidden_BxD, caches = decode.decode_step(
            weights.params,
            weights.layers,
            config,
            slots.token_B,
            tables,
            slots.caches,
            slots.column,
            age_S < context_B[:, None],
        )
        slots = slots._replace(caches=caches, column=(slots.column + 1) % S)
        slots = append(slots, rules, ~slots.done_B, hidden_BxD, head_VxD, vocab_size)
        return slots, newest(slots)

    return jax.lax.while_loop(unfinished, body, (slots, newest(slots)))[0]


@functools.partial(jax.jit, static_argnames=("config", "mesh", "rows", "columns", "width"))
def empty(config: Qwen3Config, mesh: Mesh, rows: int, columns: int, width: int) -> Slots:
    """Slots without a response; `width` is of the buffers."""
    N, K, dtype = config.num_key_value_heads, config.head_dim, config.compute_dtype
    caches = [
        KVCache(
            keys=jnp.zeros((rows, N, K, columns), dtype),
            values=jnp.zeros((rows, N, columns, K), dtype),
        )
        for _ in range(config.num_hidden_layers)
    ]
    return _placed(fresh(caches, 0, rows, width), mesh)


@functools.partial(jax.jit, static_argnames=("mesh", "vocab_size"), donate_argnames="slots")
def refill(
    weights: decode.Weights,
    slots: Slots,
    prefilled: Prefilled,
    refill: Refill,
    rules: Rules,
    *,
    mesh: Mesh,
    vocab_size: int,
) -> Slots:
    """Lays prompts into the rings of free slots, and draws their first tokens."""
    slots = _placed(slots, mesh)
    S = columns_of(slots.caches[0])

    def put(i: jax.Array, caches: list[KVCache]) -> list[KVCache]:
        slot = refill.slots_B[i]
        source = refill.sources_B[slot]

        def into(cache: jax.Array, prompts: jax.Array, axis: int) -> jax.Array:
            row = jax.lax.dynamic_slice_in_dim(prompts, source, 1, axis=0)
            ring = jnp.roll(padded(row, axis, before=S - row.shape[axis]), slots.column, axis)
            return jax.lax.dynamic_update_slice_in_dim(cache, ring, slot, axis=0)

        return [
            jax.tree.map(into, cache, prompts, COLUMNS)
            for cache, prompts in zip(caches, prefilled.caches, strict=True)
        ]

    caches = jax.lax.fori_loop(0, refill.starts, put, slots.caches)
    slots = start(
        slots._replace(caches=caches),
        rules,
        refill.fresh_B,
        refill.prompts_B,
        jax.random.wrap_key_data(refill.keys_BxU),
        prefilled.hidden_MxD[refill.sources_B],
        qwen3.unembedding(weights.params),
        vocab_size,
    )
    return _placed(slots, mesh)


@functools.partial(
    jax.jit, static_argnames=("config", "mesh", "vocab_size"), donate_argnames="slots"
)
def advance(
    weights: decode.Weights,
    config: Qwen3Config,
    slots: Slots,
    rules: Rules,
    *,
    mesh: Mesh,
    vocab_size: int,
) -> tuple[Slots, View]:
    """A segment: W - 1 tokens of every slot, fewer where all are done before."""
    slots = _placed(slots, mesh)._replace(step=jnp.int32(1))  # the first is of `refill`
    width = slots.tokens_BxW.shape[1]
    slots = decode_until_done(weights, config, slots, rules, vocab_size, width)
    slots = _placed(slots, mesh)
    view = View(*(getattr(slots, name) for name in View._fields))
    return slots, jax.lax.with_sharding_constraint(view, sharding.whole(mesh))


@functools.partial(jax.jit, static_argnames=("mesh", "columns"))
def resize(cache: KVCache, column: jax.Array, *, mesh: Mesh, columns: int) -> KVCache:
    """A layer's ring with another number of columns; the newest stay.

    A layer at a time: the rings of all layers are never there twice. Columns lie oldest first: the
    next to be written is 0, the oldest that is left, or, in a larger ring, the first new one.
    """
    S = columns_of(cache)

    def laid(kept: jax.Array, axis: int) -> jax.Array:
        oldest_first = jnp.roll(kept, -column, axis)
        if columns <= S:
            return jax.lax.slice_in_dim(oldest_first, S - columns, S, axis=axis)
        return padded(oldest_first, axis, after=columns - S)

    placed = placements(mesh).caches
    cache = jax.lax.with_sharding_constraint(cache, placed)
    return jax.lax.with_sharding_constraint(jax.tree.map(laid, cache, COLUMNS), placed)


def columns_of(cache: KVCache) -> int:
    """S, of a layer's cache or of stacked ones."""
    return cache.values.shape[COLUMNS.values]


def padded(array: jax.Array, axis: int, before: int = 0, after: int = 0) -> jax.Array:
    """With zeros before and after along one axis."""
    room = [(0, 0)] * array.ndim
    room[axis] = before, after
    return jnp.pad(array, room)


def placements(mesh: Mesh) -> Any:
    """Rows over the batch axes, caches over their heads too: the same at every program's ends."""
    cache = sharding.spec(sharding.DECODE_RULES, ("batch", "kv_heads", None, None))
    placed: Any = dict.fromkeys(Slots._fields, sharding.batch_sharding(mesh))
    placed |= dict.fromkeys(("column", "step"), sharding.whole(mesh))
    return Slots(**placed | {"caches": NamedSharding(mesh, cache)})


def _placed(slots: Slots, mesh: Mesh) -> Slots:
    return jax.lax.with_sharding_constraint(slots, placements(mesh))
