"""Sampling: a batch in one jitted call, or any number of prompts by continuous batching.

The sampler reads the very parameters that train: a call begins by casting them to the compute dtype
and laying them out for decoding, on the devices, as far as they are not. That copy and the KV cache
never leave these, and go with the call.

Shapes: B rows, P prompt width, R response width, N prompts of a call.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from opsdc_jax import continuous, prefill, sharding, slots
from opsdc_jax.config import InputError
from opsdc_jax.continuous import Layout, Piece
from opsdc_jax.models import decode, qwen3
from opsdc_jax.models.layers import Qwen3Config
from opsdc_jax.models.qwen3 import Params
from opsdc_jax.rollout import Rollout, fitting, left_pad
from opsdc_jax.sampling import SamplingParams
from opsdc_jax.slots import Rules


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


@functools.partial(jax.jit, static_argnames=("config", "mesh", "vocab_size", "response_width"))
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
    B, P = request.prompts_BxP.shape
    params = decode.for_decoding(params, config, mesh)
    prefilled = prefill.by_stack(
        params, config, mesh, request.prompts_BxP, request.prompt_lengths_B
    )
    state = slots.fresh(prefilled.caches, P, B, response_width)
    state = state._replace(tokens_BxW=jnp.full_like(state.tokens_BxW, request.pad_id))
    budget = jnp.minimum(request.sampling.max_tokens, response_width)
    rules = Rules(request.sampling._replace(max_tokens=budget), request.stop_ids)
    state = slots.start(
        state,
        rules,
        state.done_B,
        request.prompt_lengths_B,
        request.keys_B,
        prefilled.hidden_MxD,
        qwen3.unembedding(params),
        vocab_size,
    )
    weights = decode.Weights(decode.outside_layers(params), decode.unstack_layers(params, config))
    # The first half of the tokens does not pay for the columns of the second.
    for width in continuous.one_program_widths(response_width):
        wider = [slots.resize(old, 0, mesh=mesh, columns=P + width) for old in state.caches]
        state = state._replace(caches=wider)
        state = slots.decode_until_done(weights, config, state, rules, vocab_size, width)
    rollout = Rollout(state.tokens_BxW, state.lengths_B, state.stopped_B, state.logprobs_BxW)
    return jax.lax.with_sharding_constraint(rollout, sharding.whole(mesh))


class Response(NamedTuple):
    """A finished response, on the host.

    Attributes:
      number: of its prompt among those given.
      tokens: sampled ids, the stop token included.
      logprobs: of each, see `Rollout`.
      stopped: False where the budget cut it.
    """

    number: int
    tokens: np.ndarray
    logprobs: np.ndarray
    stopped: bool


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Host side of sampling: pads prompts to one width and places their rows on the mesh.

    A sequence's key alone decides what is drawn, so none of these ways changes a response, unless
    two candidates for a token are equal to within rounding: the shapes of a program move logits in
    their last bits.

    Attributes:
      mesh: of decoding (`decode_mesh`).
      prompt_buckets: widths that prompts are padded to, ascending (`rollout.length_buckets`).
      response_width: static width of the buffers, in tokens.
      vocab_size: the tokenizer's entries.
      stop_ids, pad_id: see `Request`.
      slots: rows that decode at a time, which bounds the KV cache; 0 is the whole batch.
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
        """One response for each prompt, on the host."""
        return self.start(params, prompts, keys_B, sampling)()

    def start(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        keys_B: jax.Array,
        sampling: SamplingParams,
    ) -> Callable[[], Rollout]:
        """Starts on one response for each prompt.

        A batch that the slots hold is one program, unless a cache that grows by segments begins
        much smaller (`continuous.worthwhile`). Any other is sampled in segments, of which the first
        is under way on return.

        Returns:
          a function, to be called once, that gives the responses on the host. Until it returns,
          `params` must not be donated.
        """
        widths = self.prompt_buckets[-1], self.response_width
        if continuous.worthwhile(self.slots, len(prompts), *widths):
            segments = self._segments(params, prompts, keys_B, sampling)
            grown = _Grown(len(prompts), self.response_width, self.pad_id)

            def finish() -> Rollout:
                for pieces in segments:
                    grown.add(pieces)
                return grown.rollout

            return finish
        width = fitting(self.prompt_buckets, max(map(len, prompts)))
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        padded = left_pad(prompts, width, self.pad_id)
        rest = sampling, np.asarray(self.stop_ids, np.int32), self.pad_id
        # Every input has a place: the compiler's own choice for one may fit no mesh of the call.
        rows, whole = sharding.batch_sharding(self.mesh), sharding.whole(self.mesh)
        request = Request(
            *sharding.place((padded, lengths, keys_B), rows), *sharding.place(rest, whole)
        )
        rollout = generate(
            params,
            self.model,
            request,
            mesh=self.mesh,
            vocab_size=self.vocab_size,
            response_width=self.response_width,
        )
        return lambda: jax.device_get(rollout)

    def responses(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        keys_N: jax.Array,
        sampling: SamplingParams,
    ) -> Iterator[list[Response]]:
        """Responses as they end, by continuous batching in `slots` rows: a list every segment.

        Equal prompts side by side are prefilled once. While the caller has a list, the next segment
        runs.
        """
        growing: dict[int, list[Piece]] = {}
        for pieces in self._segments(params, prompts, keys_N, sampling):
            ended = []
            for piece in pieces:
                growing.setdefault(piece.number, []).append(piece)
                if piece.done:
                    parts = growing.pop(piece.number)
                    tokens, logprobs = (
                        np.concatenate([getattr(part, name) for part in parts])
                        for name in ("tokens", "logprobs")
                    )
                    ended.append(Response(piece.number, tokens, logprobs, piece.stopped))
            yield ended

    def stream(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        keys_B: jax.Array,
        sampling: SamplingParams,
    ) -> Iterator[Rollout]:
        """The responses as they grow, segment by segment, the end included; on the host."""
        grown = _Grown(len(prompts), self.response_width, self.pad_id)
        for pieces in self._segments(params, prompts, keys_B, sampling):
            grown.add(pieces)
            yield jax.tree.map(np.copy, grown.rollout)

    def _segments(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        keys_N: jax.Array,
        sampling: SamplingParams,
    ) -> Iterator[list[Piece]]:
        """What `continuous.segments` gives; the first segment is under way on return."""
        parts = continuous.batch_parts(self.mesh)
        rows = continuous.rows_for(self.slots, len(prompts), parts)
        layout = Layout(
            model=self.model,
            mesh=self.mesh,
            vocab_size=self.vocab_size,
            rows=rows,
            prompt_width=fitting(self.prompt_buckets, max(map(len, prompts))),
            longest_prompt=self.prompt_buckets[-1],
            response_width=self.response_width,
            segment=continuous.SEGMENT,
            pad_id=self.pad_id,
        )
        budget = min(int(sampling.max_tokens), self.response_width)
        rules = Rules(sampling._replace(max_tokens=budget), np.asarray(self.stop_ids, np.int32))
        rules = sharding.place(rules, sharding.whole(self.mesh))
        keys_NxU = jax.device_get(jax.random.key_data(keys_N))
        segments = continuous.segments(params, layout, prompts, keys_NxU, rules)
        next(segments)
        return segments


class _Grown:
    """A rollout on the host that is filled piece by piece."""

    def __init__(self, rows: int, width: int, pad_id: int):
        self.rollout = Rollout(
            tokens_BxR=np.full((rows, width), pad_id, np.int32),
            lengths_B=np.zeros(rows, np.int32),
            stopped_B=np.zeros(rows, bool),
            logprobs_BxR=np.zeros((rows, width), np.float32),
        )

    def add(self, pieces: Sequence[Piece]) -> None:
        """Appends what a segment added."""
        for piece in pieces:
            row, first = piece.number, self.rollout.lengths_B[piece.number]
            new = slice(first, first + len(piece.tokens))
            self.rollout.tokens_BxR[row, new] = piece.tokens
            self.rollout.logprobs_BxR[row, new] = piece.logprobs
            self.rollout.lengths_B[row] = new.stop
            self.rollout.stopped_B[row] = piece.stopped
