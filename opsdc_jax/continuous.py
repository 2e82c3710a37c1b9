"""Continuous batching: when a response ends, its slot takes the next prompt.

The host side of `slots`. Decoding runs in segments; between two of them the host reads which rows
are done (small arrays, the same on every process), refills their slots and gives the ring as many
columns as the longest context will need. It does so at once; whatever else there is to do about
finished responses, its caller does while the next segment runs.

Shapes: see `slots`; `number` is a response's place in the list of prompts.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from opsdc_jax import prefill, sharding, slots
from opsdc_jax.models import decode
from opsdc_jax.models.layers import Qwen3Config
from opsdc_jax.models.qwen3 import Params
from opsdc_jax.rollout import left_pad
from opsdc_jax.slots import Refill, Rules, View

SEGMENT = 32  # tokens between two looks at what is done
LEAST_COLUMNS = 256  # of a ring: a shorter one saves less than its programs cost to compile


def ring_columns(longest_prompt: int, response_width: int, segment: int) -> tuple[int, ...]:
    """The sizes of the ring, ascending: an eighth of whole contexts, quarter, half, 3/4, all."""
    whole = longest_prompt + response_width
    unit = 128 if whole >= 1024 else 8  # what kernels like
    least = max(longest_prompt + segment, LEAST_COLUMNS)
    parts = (math.ceil(max(whole / part, least) / unit) * unit for part in (4 / 3, 2, 4, 8))
    return tuple(sorted({whole, *(size for size in parts if size < whole)}))


def one_program_widths(response_width: int) -> tuple[int, ...]:
    """Tokens of a response that one program's cache has room for, ascending: half, then all."""
    half = (response_width // 2,) if response_width >= 2 * SEGMENT else ()
    return *half, response_width


def refilled(slots: int, responses: int) -> bool:
    """Whether responses outnumber the slots; 0 slots are one for each response."""
    return 0 < slots < responses


def worthwhile(slots: int, responses: int, longest_prompt: int, response_width: int) -> bool:
    """Whether a batch is sampled in segments, where one program could do it at once.

    Over as many columns, one program's step is the faster one (on a CPU by a tenth; docs/LOG.md).
    So where no slot is refilled, the ring must begin with half of its columns, or fewer.

    Args:
      slots: rows that decode at a time; 0: all.
      longest_prompt, response_width: as in `Layout`.
    """
    first = ring_columns(longest_prompt, response_width, SEGMENT)[0]
    one_program = longest_prompt + one_program_widths(response_width)[0]
    return refilled(slots, responses) or 2 * first <= one_program


class Layout(NamedTuple):
    """The static sizes of a call: each set of them is compiled once.

    Attributes:
      mesh: of decoding.
      rows: slots.
      prompt_width: that the prompts of this call are padded to.
      longest_prompt: tokens of any call's. The ring follows it, so that few programs depend on the
        width.
      response_width: tokens of a response, at most.
      segment: tokens of a segment.
      pad_id: of the padding on the left.
    """

    model: Qwen3Config
    mesh: Mesh
    vocab_size: int
    rows: int
    prompt_width: int
    longest_prompt: int
    response_width: int
    segment: int
    pad_id: int

    @property
    def prompts(self) -> int:
        """Prompts that are prefilled together: for a quarter of the slots."""
        parts = batch_parts(self.mesh)
        return math.ceil(self.rows / (4 * parts)) * parts

    @property
    def columns(self) -> tuple[int, ...]:
        """See `ring_columns`."""
        return ring_columns(self.longest_prompt, self.response_width, self.segment)

    def next_columns(self, columns: int, longest: int) -> int:
        """The size that follows `columns`, by one at most: fewer programs than one for each pair.

        It shrinks only where it would hold for a segment more: sizes do not take turns.

        Args:
          longest: tokens of the longest context before the next segment.
        """
        most, place = self.columns[-1], self.columns.index(columns)
        if columns < min(longest + self.segment, most):
            return self.columns[place + 1]
        if place and self.columns[place - 1] >= longest + 2 * self.segment:
            return self.columns[place - 1]
        return columns


class Piece(NamedTuple):
    """What a segment added to a response.

    Attributes:
      number: of the response.
      tokens, logprobs: as in `Rollout`, without padding.
      done: nothing more will come.
      stopped: it ended by a stop id.
    """

    number: int
    tokens: np.ndarray
    logprobs: np.ndarray
    done: bool
    stopped: bool


def batch_parts(mesh: Mesh) -> int:
    """How many parts of a mesh rows are split over."""
    return mesh.shape["replica"] * mesh.shape["fsdp"]


def rows_for(slots: int, responses: int, parts: int) -> int:
    """The slots that so many responses need: `slots`, halved while all of them have one.

    Args:
      slots: 0: one for each response.
      parts: `batch_parts` of the mesh, of which the rows are a multiple: some may stay free.
    """
    rows = math.ceil((slots or responses) / parts) * parts
    while rows % (2 * parts) == 0 and rows // 2 >= responses:
        rows //= 2
    return rows


def segments(
    params: Params,
    layout: Layout,
    prompts: Sequence[Sequence[int]],
    keys_NxU: np.ndarray,
    rules: Rules,
) -> Iterator[list[Piece]]:
    """Samples a response to each prompt; yields, segment by segment, what was added to which.

    Equal prompts side by side are prefilled once. When a segment is yielded, the next is already
    under way: first comes an empty list, once the first one is.

    Args:
      keys_NxU: `jax.random.key_data` of each response's key.
      rules: with arrays that lie on the mesh; a budget of at most `layout.response_width`.
    """
    model, mesh, whole = layout.model, layout.mesh, sharding.whole(layout.mesh)
    static = {"mesh": mesh, "vocab_size": layout.vocab_size}
    weights = decode.prepare(params, model, mesh)
    columns = layout.columns[0]
    state = slots.empty(model, mesh, layout.rows, columns, layout.segment + 1)
    books = _Books(prompts, keys_NxU, layout.rows)
    held, prefilled = range(0), None
    pieces: list[Piece] = []
    while books.busy:
        while books.can_start:
            if books.next_prompt not in held:
                prefilled = None  # makes room for the next
                held = range(books.next_prompt, books.next_prompt + layout.prompts)
                batch = books.batch(held, layout.prompt_width, layout.pad_id)
                placed = sharding.place(batch, sharding.batch_sharding(mesh))
                prefilled = prefill.by_layers(weights, model, mesh, *placed)
            refill = sharding.place(books.start(held), whole)
            state = slots.refill(weights, state, prefilled, refill, rules, **static)
        if books.all_started:
            prefilled = None  # room for longer rings
        while (new := layout.next_columns(columns, books.longest)) != columns:
            for layer, cache in enumerate(state.caches):
                state.caches[layer] = slots.resize(cache, state.column, mesh=mesh, columns=new)
            column = sharding.place(columns if new > columns else 0, whole)
            state, columns = state._replace(column=column), new
        state, view = slots.advance(weights, model, state, rules, **static)
        yield pieces
        pieces = books.enter(jax.device_get(view))
    yield pieces


class _Books:
    """Which response is in which slot, and how long it is; on the host."""

    def __init__(self, prompts: Sequence[Sequence[int]], keys_NxU: np.ndarray, rows: int):
        self._distinct: list[Sequence[int]] = []
        self._prompt_N = []  # of each response, its place in `_distinct`
        for prompt in prompts:
            if not self._distinct or prompt != self._distinct[-1]:
                self._distinct.append(prompt)
            self._prompt_N.append(len(self._distinct) - 1)
        self._keys_NxU = keys_NxU
        self._next = 0
        self._number_B = np.full(rows, -1)  # -1: free
        self._started_B = np.zeros(rows, bool)  # since the last segment
        self._prompts_B, self._lengths_B = np.zeros((2, rows), np.int32)

    @property
    def busy(self) -> bool:
        """Whether there is anything left to sample."""
        return not self.all_started or bool((self._number_B >= 0).any())

    @property
    def all_started(self) -> bool:
        """Whether no prompt waits any more."""
        return self._next == len(self._prompt_N)

    @property
    def can_start(self) -> bool:
        """Whether a response waits and a slot is free."""
        return not self.all_started and bool((self._number_B < 0).any())

    @property
    def next_prompt(self) -> int:
        """Of the next response, among the distinct ones."""
        return self._prompt_N[self._next]

    @property
    def longest(self) -> int:
        """Tokens of the longest context under way; a response that starts has its first."""
        context_B = self._prompts_B + np.maximum(self._lengths_B, 1)
        return int(context_B[self._number_B >= 0].max())

    def batch(self, held: range, width: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
        """The distinct prompts of those numbers and their lengths; filled up with the last."""
        last = len(self._distinct) - 1
        prompts = [self._distinct[min(number, last)] for number in held]
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        return left_pad(prompts, width, pad_id), lengths

    def start(self, held: range) -> Refill:
        """Gives free slots to the next responses, as far as their prompts are at hand."""
        rows = len(self._number_B)
        slots_B, sources_B, count = np.zeros(rows, np.int32), np.zeros(rows, np.int32), 0
        fresh_B = np.zeros(rows, bool)
        keys_BxU = np.zeros((rows, self._keys_NxU.shape[1]), np.uint32)
        for slot in np.flatnonzero(self._number_B < 0):
            if self.all_started or self.next_prompt not in held:
                break
            slots_B[count], fresh_B[slot] = slot, True
            sources_B[slot] = held.index(self.next_prompt)
            keys_BxU[slot] = self._keys_NxU[self._next]
            self._prompts_B[slot] = len(self._distinct[self.next_prompt])
            self._lengths_B[slot], self._started_B[slot] = 0, True
            self._number_B[slot] = self._next
            self._next, count = self._next + 1, count + 1
        return Refill(count, slots_B, fresh_B, sources_B, self._prompts_B.copy(), keys_BxU)

    def enter(self, view: View) -> list[Piece]:
        """Takes up what a segment has done; frees the slots of finished responses."""
        pieces = []
        for slot in np.flatnonzero(self._number_B >= 0):
            first = 0 if self._started_B[slot] else 1  # the buffer's first is drawn by a refill
            new = slice(first, first + view.lengths_B[slot] - self._lengths_B[slot])
            pieces.append(
                Piece(
                    number=int(self._number_B[slot]),
                    tokens=view.tokens_BxW[slot, new].copy(),
                    logprobs=view.logprobs_BxW[slot, new].copy(),
                    done=bool(view.done_B[slot]),
                    stopped=bool(view.stopped_B[slot]),
                )
            )
        self._lengths_B[:] = view.lengths_B
        self._started_B[:] = False
        self._number_B[view.done_B] = -1
        return pieces
