"""One jitted generate call: left-padded prompts in, prefill, decode loop with early exit.

The sampler reads the very parameters that train: the call begins by casting them to the compute
dtype and laying them out for decoding, on the devices. That copy and the KV cache are made inside
the call and never leave it.

Shapes: B rows, P prompt width, R response width, S = P + R cache slots, V vocabulary.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from opsdc_jax import sharding
from opsdc_jax.config import InputError
from opsdc_jax.models import decode, qwen3
from opsdc_jax.models.qwen3 import KVCache, Params, Qwen3Config
from opsdc_jax.rollout import Rollout, fitting, left_pad
from opsdc_jax.sampling import SamplingParams, draw, log_probability


class _Decode(NamedTuple):
    """State of the decode loop; `step` counts the tokens sampled so far."""

    step: jax.Array
    token_B: jax.Array
    done_B: jax.Array
    lengths_B: jax.Array
    tokens_BxR: jax.Array
    logprobs_BxR: jax.Array
    caches: list[KVCache]


class Request(NamedTuple):
    """What to sample for: all that `generate` takes besides the model.

    Attributes:
      prompts_BxP: prompts padded on the left (`rollout.left_pad`).
      prompt_lengths_B: their lengths.
      keys_B: one random key per sequence (`sequence_keys`). Token t of a sequence is drawn from
        fold_in(key, t): neighbours and the place in the batch play no part.
      sampling: temperature, top-p, top-k, budget.
      stop_ids: ids that end a response; the one sampled is kept.
      pad_id: fills the buffer after the response.
    """

    prompts_BxP: jax.Array
    prompt_lengths_B: jax.Array
    keys_B: jax.Array
    sampling: SamplingParams
    stop_ids: jax.Array | np.ndarray
    pad_id: jax.Array | int


def decode_mesh(config: Qwen3Config, mesh: Mesh, width: int) -> Mesh:
    """The mesh of training, cut for decoding (`sharding.make_decode_mesh`).

    Each device holds, during a rollout, 1 / width of the weights in compute dtype, and the KV cache
    of its rows and heads. A width up to the number of key/value heads is the best of both: no key
    or value is held twice, and the weights read for a token are spread over `width` memories.

    Args:
      mesh: of training.
      width: devices that each layer is split over; -1 takes the most, up to one a key/value head.

    Raises:
      InputError: the model cannot be split so.
    """

    qwen3.shardings(config, mesh)  # what training's mesh cannot split, no part of it can

    def cut(width: int) -> Mesh:
        made = sharding.make_decode_mesh(mesh, width, config.num_key_value_heads)
        qwen3.shardings(config, made, sharding.DECODE_RULES)  # refuses what does not divide
        return made

    if width == -1:
        for wide in reversed(sharding.decode_widths(mesh, config.num_key_value_heads)):
            if wide <= config.num_key_value_heads:
                with contextlib.suppress(InputError):
                    return cut(wide)
        width = mesh.shape["tensor"]
    return cut(width)


_STATIC = ("config", "mesh", "vocab_size", "response_width")


@functools.partial(jax.jit, static_argnames=_STATIC)
def generate(
    params: Params,
    config: Qwen3Config,
    request: Request,
    *,
    mesh: Mesh,
    vocab_size: int,
    response_width: int,
) -> Rollout:
    """Samples one response for each prompt: prefill, then decoding until all are done.

    Args:
      mesh: `decode_mesh` of the mesh that the parameters lie on.
      vocab_size: the tokenizer's entries; embedding rows beyond them are never sampled.
      response_width: static size of the buffers, at least the budget.

    Returns:
      the responses, whole on every device, so that every process of a run can read all of them.
    """
    params = _for_decoding(params, config, mesh)
    state = _prefill(params, config, request, mesh, vocab_size, response_width)
    state = _decode(params, config, request, state, vocab_size, response_width)
    rollout = Rollout(
        tokens_BxR=state.tokens_BxR,
        lengths_B=state.lengths_B,
        stopped_B=state.done_B,
        logprobs_BxR=state.logprobs_BxR,
    )
    return jax.lax.with_sharding_constraint(rollout, sharding.whole(mesh))


def _for_decoding(params: Params, config: Qwen3Config, mesh: Mesh) -> Params:
    """The parameters in compute dtype and decoding's layout.

    In two moves: first the heads (and feed-forward width, and vocabulary) are split as they will
    be, by all-to-alls, then `embed` is gathered. Asked for both at once, the compiler gathers every
    parameter whole on every device.
    """
    params = jax.tree.map(lambda leaf: leaf.astype(config.compute_dtype), params)
    for rules in ({**sharding.DECODE_RULES, "embed": "fsdp"}, sharding.DECODE_RULES):
        placed = qwen3.shardings(config, mesh, rules)
        params = jax.lax.with_sharding_constraint(params, placed)
    return params


def stream(
    params: Params,
    config: Qwen3Config,
    request: Request,
    *,
    mesh: Mesh,
    vocab_size: int,
    response_width: int,
    segment: int,
) -> Iterator[Rollout]:
    """Like `generate`, yielding what there is after every `segment` tokens, the end included.

    The cache stays on the device and is donated from one segment to the next.
    """
    static = {"mesh": mesh, "vocab_size": vocab_size, "response_width": response_width}
    state = _start(params, config, request, **static)
    budget = min(int(request.sampling.max_tokens), response_width)
    while True:
        tokens, lengths, done, logprobs = jax.device_get(
            (state.tokens_BxR, state.lengths_B, state.done_B, state.logprobs_BxR)
        )
        yield Rollout(tokens, lengths, done, logprobs)
        if done.all() or state.step >= budget:
            return
        state = _advance(params, config, request, state, state.step + segment, **static)


@functools.partial(jax.jit, static_argnames=_STATIC)
def _start(
    params: Params,
    config: Qwen3Config,
    request: Request,
    *,
    mesh: Mesh,
    vocab_size: int,
    response_width: int,
) -> _Decode:
    params = _for_decoding(params, config, mesh)
    return _prefill(params, config, request, mesh, vocab_size, response_width)


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames="state")
def _advance(
    params: Params,
    config: Qwen3Config,
    request: Request,
    state: _Decode,
    until: jax.Array,
    *,
    mesh: Mesh,
    vocab_size: int,
    response_width: int,
) -> _Decode:
    params = _for_decoding(params, config, mesh)
    # The last call's outputs are named after training's mesh: arrays of two meshes do not mix.
    cache = sharding.spec(sharding.DECODE_RULES, ("batch", "kv_heads", None, None))
    placed: Any = dict.fromkeys(_Decode._fields, sharding.batch_sharding(mesh))
    placed |= {"step": sharding.whole(mesh), "caches": NamedSharding(mesh, cache)}
    state = jax.lax.with_sharding_constraint(state, _Decode(**placed))
    return _decode(params, config, request, state, vocab_size, response_width, until)


def _prefill(
    params: Params, config: Qwen3Config, request: Request, mesh: Mesh, vocab_size: int, R: int
) -> _Decode:
    """Runs the prompts and draws each response's first token."""
    B, P = request.prompts_BxP.shape
    first_B = P - request.prompt_lengths_B  # slot of each row's first real token
    slots = jnp.arange(P)
    hidden_BxPxD, stacked = qwen3.prefill(
        params,
        config,
        request.prompts_BxP,
        positions_BxT=jnp.maximum(slots - first_B[:, None], 0),
        valid_BxT=slots >= first_B[:, None],
        mesh=mesh,
    )
    room = ((0, 0), (0, 0), (0, 0), (0, R), (0, 0))
    # Stated: a cache that followed the compiler's choice could be whole on every device.
    split = sharding.spec(sharding.DECODE_RULES, ("layers", "batch", "kv_heads", None, None))
    stacked = jax.lax.with_sharding_constraint(
        jax.tree.map(lambda leaf: jnp.pad(leaf, room), stacked), NamedSharding(mesh, split)
    )
    state = _Decode(
        step=jnp.int32(0),
        token_B=jnp.zeros((B,), jnp.int32),
        done_B=jnp.zeros((B,), bool),
        lengths_B=jnp.zeros((B,), jnp.int32),
        tokens_BxR=jnp.full((B, R), request.pad_id, jnp.int32),
        logprobs_BxR=jnp.zeros((B, R), jnp.float32),
        caches=[
            jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
            for i in range(config.num_hidden_layers)
        ],
    )
    return _append(state, request, hidden_BxPxD[:, -1], qwen3.unembedding(params), vocab_size)


def _decode(
    params: Params,
    config: Qwen3Config,
    request: Request,
    state: _Decode,
    vocab_size: int,
    R: int,
    until: jax.Array | int = 2**30,
) -> _Decode:
    """Draws tokens until every row is done, the budget is spent, or `until` are sampled."""
    P = request.prompts_BxP.shape[1]
    first_B = P - request.prompt_lengths_B
    slots = jnp.arange(P + R)
    limit = jnp.minimum(jnp.minimum(request.sampling.max_tokens, R), until)
    # Cast and unstacked once a call, not once a token.
    head_VxD = qwen3.unembedding(params).astype(config.compute_dtype)
    layers = decode.unstack_layers(params, config)

    def unfinished(state: _Decode) -> jax.Array:
        return (state.step < limit) & ~jnp.all(state.done_B)

    def body(state: _Decode) -> _Decode:
        slot = P + state.step - 1  # of the newest token, whose successor is drawn here
        hidden_BxD, caches = decode.decode_step(
            params,
            layers,
            config,
            state.token_B,
            request.prompt_lengths_B + state.step - 1,
            state.caches,
            slot,
            (slots >= first_B[:, None]) & (slots <= slot),
        )
        return _append(state._replace(caches=caches), request, hidden_BxD, head_VxD, vocab_size)

    return jax.lax.while_loop(unfinished, body, state)


def _append(
    state: _Decode,
    request: Request,
    hidden_BxD: jax.Array,
    head_VxD: jax.Array,
    vocab_size: int,
) -> _Decode:
    """Draws the next token of the rows that are still running."""
    logits_BxV = decode.logits(hidden_BxD, head_VxD, vocab_size)
    drawn_B = draw(logits_BxV, request.keys_B, state.step, request.sampling)
    logprob_B = log_probability(logits_BxV, drawn_B)
    running_B = ~state.done_B
    token_B = jnp.where(running_B, drawn_B, request.pad_id)
    logprob_B = jnp.where(running_B, logprob_B, 0.0)
    column = (0, state.step)
    return state._replace(
        step=state.step + 1,
        token_B=token_B,
        done_B=state.done_B | jnp.isin(drawn_B, request.stop_ids),
        lengths_B=state.lengths_B + running_B.astype(jnp.int32),
        tokens_BxR=jax.lax.dynamic_update_slice(state.tokens_BxR, token_B[:, None], column),
        logprobs_BxR=jax.lax.dynamic_update_slice(state.logprobs_BxR, logprob_B[:, None], column),
    )


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Host side of `generate`: pads prompts to one width and places their rows on the mesh.

    Attributes:
      mesh: of decoding (`decode_mesh`).
      prompt_buckets: widths that prompts are padded to, ascending (`rollout.length_buckets`).
      response_width: static width of the buffers, in tokens.
      vocab_size: the tokenizer's entries.
      stop_ids, pad_id: see `Request`.
      slots: rows that decode at a time, which bounds the KV cache; 0 is the whole batch. The next
        rows wait until all of these are done.
    """

    model: Qwen3Config
    mesh: Mesh
    prompt_buckets: tuple[int, ...]
    response_width: int
    vocab_size: int
    stop_ids: tuple[int, ...]
    pad_id: int
    slots: int = 0

    def __call__(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        keys_B: jax.Array,
        sampling: SamplingParams,
    ) -> Rollout:
        """Starts one response for each prompt; the arrays may still be under way on return.

        A sequence's key alone decides what is drawn, so waves of `slots` rows change no response.
        """
        wave = self.slots or len(prompts)
        width = fitting(self.prompt_buckets, max(map(len, prompts)))
        waves = []
        for start in range(0, len(prompts), wave):
            rows = slice(start, start + wave)
            with jax.transfer_guard_host_to_device("allow"):  # of the slice's bounds
                keys = keys_B[rows]
            request = self._request(prompts[rows], width, keys, sampling)
            waves.append(generate(params, self.model, request, **self._static))
        return waves[0] if len(waves) == 1 else _joined(waves)

    def stream(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        keys_B: jax.Array,
        sampling: SamplingParams,
        segment: int,
    ) -> Iterator[Rollout]:
        """The responses as they grow, every `segment` tokens (see `stream`)."""
        width = fitting(self.prompt_buckets, max(map(len, prompts)))
        request = self._request(prompts, width, keys_B, sampling)
        return stream(params, self.model, request, segment=segment, **self._static)

    @property
    def _static(self) -> dict[str, Any]:
        return {
            "mesh": self.mesh,
            "vocab_size": self.vocab_size,
            "response_width": self.response_width,
        }

    def _request(
        self,
        prompts: Sequence[Sequence[int]],
        width: int,
        keys_B: jax.Array,
        sampling: SamplingParams,
    ) -> Request:
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        padded = left_pad(prompts, width, self.pad_id)
        rest = sampling, np.asarray(self.stop_ids, np.int32), self.pad_id
        # Every input has a place: the compiler's own choice for one may fit no mesh of the call.
        rows, whole = sharding.batch_sharding(self.mesh), sharding.whole(self.mesh)
        return Request(
            *sharding.place((padded, lengths, keys_B), rows), *sharding.place(rest, whole)
        )


@jax.jit
def _joined(waves: list[Rollout]) -> Rollout:
    """The rows of all waves, in order."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *waves)
