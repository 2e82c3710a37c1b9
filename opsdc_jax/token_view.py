"""Where the teacher disagrees: both sides' view of every token of a few rollouts.

Training reduces the divergence to one number a step. Here it stays apart token by token, with what
either side would rather have said, so that a person sees which words the teacher would leave out.

Shapes: B rows, R response width, N = B * R positions, C chunk, V vocabulary, K choices.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from opsdc_jax import sharding
from opsdc_jax.models import qwen3
from opsdc_jax.models.layers import Qwen3Config
from opsdc_jax.models.qwen3 import Params
from opsdc_jax.objective import response_hidden
from opsdc_jax.rollout import Array, DistillBatch, Rollout, pair

CHUNK = 64  # positions whose logits exist at a time: few, as these heads are not split over V
CHOICES = 5  # most likely tokens kept of either side: what fits beside a token on a screen

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a part of a character decodes to


class TokenViews(NamedTuple):
    """Float32 statistics of every response position; arrays [B, R], choices [B, R, K].

    Both sides are normalised over the tokenizer's entries, as in losses.py.

    Attributes:
      kl: reverse KL from student to teacher, in nats: the position's share of the loss.
      student_entropy, teacher_entropy: in nats.
      student_prob, teacher_prob: of the sampled token, at temperature 1.
      student_ids, teacher_ids: the most likely tokens, likeliest first.
      student_probs, teacher_probs: their probabilities.
    """

    kl: Array
    student_entropy: Array
    teacher_entropy: Array
    student_prob: Array
    teacher_prob: Array
    student_ids: Array
    student_probs: Array
    teacher_ids: Array
    teacher_probs: Array


Compare = Callable[[Params, Params, DistillBatch], TokenViews]


def make_compare(
    model: Qwen3Config, *, vocab_size: int, shardings: Params, chunk: int = CHUNK
) -> Compare:
    """Builds the jitted comparison: (student, teacher, batch) -> `TokenViews`, whole everywhere.

    Its memory is bounded as the loss's is: logits exist for one chunk at a time. Positions beyond a
    row's length hold values that mean nothing.

    Args:
      vocab_size: the tokenizer's entries.
      shardings: tree of the parameters' shardings.
      chunk: response positions whose logits exist at a time.
    """

    mesh = jax.tree.leaves(shardings)[0].mesh

    def compare(student: Params, teacher: Params, batch: DistillBatch) -> TokenViews:
        B, R = batch.response_BxR.shape

        def hidden(params: Params, tokens_BxT: jax.Array, prompt_B: jax.Array) -> jax.Array:
            hidden_BxRxD = response_hidden(
                params, model, mesh, qwen3.embed(params, tokens_BxT), prompt_B, batch.lengths_B, R
            )
            return hidden_BxRxD.reshape(B * R, -1)

        inputs = (
            hidden(student, batch.student_BxT, batch.student_prompt_B),
            hidden(teacher, batch.teacher_BxT, batch.teacher_prompt_B),
            batch.response_BxR.reshape(-1),
        )
        heads = qwen3.unembedding(student), qwen3.unembedding(teacher)
        views = jax.lax.map(
            lambda part: _compare_chunk(part, heads, vocab_size),
            _in_chunks(inputs, chunk),
        )

        def unchunk(leaf: jax.Array) -> jax.Array:
            return leaf.reshape(-1, *leaf.shape[2:])[: B * R].reshape(B, R, *leaf.shape[2:])

        return jax.tree.map(unchunk, views)

    return jax.jit(compare, out_shardings=sharding.whole(mesh))


def _compare_chunk(
    part: tuple[jax.Array, ...], heads: tuple[jax.Array, jax.Array], vocab_size: int
) -> TokenViews:
    """One chunk: (student's hidden states, teacher's, sampled ids), and both output heads."""
    student_CxD, teacher_CxD, tokens_C = part
    student_head_VxD, teacher_head_VxD = heads
    log_q_CxV = _log_probs(student_CxD, student_head_VxD, vocab_size)
    log_p_CxV = _log_probs(teacher_CxD, teacher_head_VxD, vocab_size)

    def side(log_probs_CxV: jax.Array) -> tuple[jax.Array, ...]:
        sampled_C = jnp.take_along_axis(log_probs_CxV, tokens_C[:, None], axis=-1)[:, 0]
        top_CxK, ids_CxK = jax.lax.top_k(log_probs_CxV, min(CHOICES, vocab_size))
        entropy_C = -jnp.sum(jnp.exp(log_probs_CxV) * log_probs_CxV, axis=-1)
        return entropy_C, jnp.exp(sampled_C), ids_CxK, jnp.exp(top_CxK)

    student_entropy, student_prob, student_ids, student_probs = side(log_q_CxV)
    teacher_entropy, teacher_prob, teacher_ids, teacher_probs = side(log_p_CxV)
    return TokenViews(
        kl=jnp.sum(jnp.exp(log_q_CxV) * (log_q_CxV - log_p_CxV), axis=-1),
        student_entropy=student_entropy,
        teacher_entropy=teacher_entropy,
        student_prob=student_prob,
        teacher_prob=teacher_prob,
        student_ids=student_ids,
        student_probs=student_probs,
        teacher_ids=teacher_ids,
        teacher_probs=teacher_probs,
    )


def _log_probs(hidden: jax.Array, head_VxD: jax.Array, vocab_size: int) -> jax.Array:
    """Float32 log-probabilities [..., V], normalised over the tokenizer's `vocab_size` entries."""
    return jax.nn.log_softmax(qwen3.logits(hidden, head_VxD, vocab_size), axis=-1)


def _in_chunks(inputs: tuple[jax.Array, ...], chunk: int) -> tuple[jax.Array, ...]:
    """[N, ...] -> [chunks, C, ...], padded with zeros."""
    chunk = min(chunk, inputs[0].shape[0])

    def split(leaf: jax.Array) -> jax.Array:
        missing = -leaf.shape[0] % chunk
        padded = jnp.pad(leaf, ((0, missing), *((0, 0) for _ in leaf.shape[1:])))
        return padded.reshape(-1, chunk, *leaf.shape[1:])

    return jax.tree.map(split, inputs)


class Compared(NamedTuple):
    """Rollouts and their views, which may still be under way on the device.

    Attributes:
      rollout: on the host.
      views: rows beyond the rollout's fill the batch up, and mean nothing.
    """

    rollout: Rollout
    views: TokenViews


@dataclasses.dataclass(frozen=True)
class TokenViewer:
    """Host side of the comparison: batches in, rows of plain numbers and text out.

    In two parts, since the parameters are only there before an update, and the host has time after.

    Attributes:
      compare: from `make_compare`.
      rows: sharding of a batch, rows split over the batch axes.
      rows_at_a_time: rows in memory at a time; a multiple of the batch axes.
      prompt_width, response_width: static, so that one program serves every step.
    """

    compare: Compare
    tokenizer: Any
    rows: NamedSharding
    rows_at_a_time: int
    prompt_width: int
    response_width: int
    pad_id: int

    def start(
        self,
        student: Params,
        teacher: Params,
        sampled: Rollout,
        student_prompts: Sequence[Sequence[int]],
        teacher_prompts: Sequence[Sequence[int]],
        count: int,
    ) -> list[Compared]:
        """Starts the comparison of the first `count` rollouts, and does not wait for it.

        Args:
          sampled: numpy arrays, one row for each prompt.
        """
        count, started = min(count, len(student_prompts)), []
        for start in range(0, count, self.rows_at_a_time):
            # The last rows stand in for those that a full batch lacks, and are dropped again.
            last = len(student_prompts) - 1
            chosen = [min(start + row, last) for row in range(self.rows_at_a_time)]
            part = jax.tree.map(lambda leaf, chosen=chosen: np.asarray(leaf)[chosen], sampled)
            batch = pair(
                part,
                [student_prompts[row] for row in chosen],
                [teacher_prompts[row] for row in chosen],
                student_width=self.prompt_width + self.response_width,
                teacher_width=self.prompt_width + self.response_width,
                response_width=self.response_width,
                pad_id=self.pad_id,
            )
            views = self.compare(student, teacher, sharding.place(batch, self.rows))
            wanted = jax.tree.map(lambda leaf, n=count - start: leaf[:n], part)
            started.append(Compared(wanted, views))
        return started

    def finish(self, started: Sequence[Compared]) -> list[dict[str, Any]]:
        """Waits for the comparison; each rollout as `as_json` gives it."""
        rows = []
        for rollout, views in started:
            views = jax.device_get(views)
            for row, length in enumerate(rollout.lengths_B.tolist()):
                ids = rollout.tokens_BxR[row, :length].tolist()
                view = jax.tree.map(lambda leaf, row=row, n=length: leaf[row, :n], views)
                rows.append(as_json(self.tokenizer, ids, view))
        return rows


def as_json(tokenizer: Any, ids: Sequence[int], view: TokenViews) -> dict[str, Any]:
    """One response in plain lists, all of the response's length.

    `tokens` are the texts (`pieces`); `student_top` and `teacher_top` hold [text, probability]
    pairs, likeliest first. Numbers keep five significant digits, probabilities of choices three.

    Args:
      view: numpy arrays [length] and [length, K].
    """
    texts: dict[int, str] = {}

    def text(token: int) -> str:
        if token not in texts:
            texts[token] = tokenizer.decode([token])
        return texts[token]

    def top(ids_NxK: np.ndarray, probs_NxK: np.ndarray) -> list[list[list[Any]]]:
        return [
            [[text(int(token)), _rounded(prob, 3)] for token, prob in zip(*row, strict=True)]
            for row in zip(ids_NxK, probs_NxK, strict=True)
        ]

    names = ("kl", "student_entropy", "teacher_entropy", "student_prob", "teacher_prob")
    return {
        "tokens": pieces(tokenizer, ids),
        **{name: [_rounded(value, 5) for value in getattr(view, name)] for name in names},
        "student_top": top(view.student_ids, view.student_probs),
        "teacher_top": top(view.teacher_ids, view.teacher_probs),
    }


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token; joined, they are the text of all.

    A character that several tokens share stands at the last of them, and the others are empty.
    """
    texts, start, done = [], 0, 0
    for end in range(1, len(ids) + 1):
        # Decoded after the token before it, because a tokenizer may join words with a space.
        before = tokenizer.decode(ids[start:done])
        whole = tokenizer.decode(ids[start:end])
        if whole.endswith(_UNFINISHED) and end < len(ids):
            texts.append("")
        else:
            texts.append(whole[len(before) :])
            start, done = done, end
    return texts
