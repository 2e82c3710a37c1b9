"""The two typed pytrees between the sampler and the train step, and how one becomes the other.

Token ids are the only currency: the trainer sees the ids that were sampled, never re-encoded text,
and no token is added that was not sampled.

Shapes: B rows, P prompt width, R response width, T row width (P + R).
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

Array = Any  # jax.Array on the device, np.ndarray on the host


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
    """Sampled responses.

    Attributes:
      tokens_BxR: sampled ids, the stop token included; padding after it.
      lengths_B: sampled tokens in each row, the stop token included.
      stopped_B: True where the response ended by itself, False where the budget cut it.
      logprobs_BxR: log-probability of each sampled id at temperature 1, before top-k and top-p,
        normalised over the tokenizer's entries; 0 in padding.
    """

    tokens_BxR: Array
    lengths_B: Array
    stopped_B: Array
    logprobs_BxR: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DistillBatch:
    """The same responses after both prompts, padded on the right.

    Padding on the right needs no attention mask: under the causal mask no real token sees it.

    Attributes:
      student_BxT: student prompt, response, padding.
      teacher_BxT: teacher prompt, the same response, padding.
      student_prompt_B, teacher_prompt_B: prompt lengths; response token t of a row is predicted
        at position prompt + t - 1.
      response_BxR: response ids.
      lengths_B: response lengths; 0 marks a padding row, which takes no part in anything.
      logprobs_BxR: the sampler's log-probabilities, for the sampler/trainer gap.
    """

    student_BxT: Array
    teacher_BxT: Array
    student_prompt_B: Array
    teacher_prompt_B: Array
    response_BxR: Array
    lengths_B: Array
    logprobs_BxR: Array


def left_pad(prompts: Sequence[Sequence[int]], width: int, pad_id: int) -> np.ndarray:
    """Prompts of at most `width` tokens as one [B, width] int32 array, right-aligned."""
    padded = np.full((len(prompts), width), pad_id, np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[width - len(prompt) :] = prompt
    return padded


def length_buckets(max_tokens: int) -> tuple[int, ...]:
    """The widths that prompts or responses are padded to: the budget, its half, quarter, eighth.

    A handful of widths, ascending, bounds the number of compilations.
    """
    return tuple(sorted({-(-max_tokens // parts) for parts in (1, 2, 4, 8)}))


def fitting(buckets: Sequence[int], tokens: int) -> int:
    """The narrowest bucket that holds so many tokens.

    Raises:
      ValueError: none does: nothing is ever cut.
    """
    if tokens > buckets[-1]:
        raise ValueError(f"{tokens} tokens do not fit into {buckets[-1]}")
    return next(width for width in buckets if width >= tokens)


def pair(
    rollout: Rollout,
    student_prompts: Sequence[Sequence[int]],
    teacher_prompts: Sequence[Sequence[int]],
    *,
    prompt_width: int,
    response_width: int,
    pad_id: int,
) -> DistillBatch:
    """Joins host-side responses to both prompts.

    Args:
      rollout: numpy arrays, one row for each prompt.
      prompt_width: at least the longest prompt of either side.
      response_width: at least the longest response.
    """
    lengths = np.asarray(rollout.lengths_B)
    rows = len(lengths)

    def join(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        joined = np.full((rows, prompt_width + response_width), pad_id, np.int32)
        for row, prompt, response, length in zip(
            joined, prompts, rollout.tokens_BxR, lengths, strict=True
        ):
            row[: len(prompt) + length] = [*prompt, *response[:length]]
        return joined, np.array([len(prompt) for prompt in prompts], np.int32)

    student, student_prompt = join(student_prompts)
    teacher, teacher_prompt = join(teacher_prompts)
    return DistillBatch(
        student_BxT=student,
        teacher_BxT=teacher,
        student_prompt_B=student_prompt,
        teacher_prompt_B=teacher_prompt,
        response_BxR=np.asarray(rollout.tokens_BxR)[:, :response_width],
        lengths_B=lengths.astype(np.int32),
        logprobs_BxR=np.asarray(rollout.logprobs_BxR)[:, :response_width],
    )


def micro_batches(
    rollout: Rollout,
    student_prompts: Sequence[Sequence[int]],
    teacher_prompts: Sequence[Sequence[int]],
    *,
    micro_batch_size: int,
    prompt_buckets: Sequence[int],
    response_buckets: Sequence[int],
    pad_id: int,
) -> Iterator[DistillBatch]:
    """Cuts a batch into micro-batches of similar length, each padded to its own bucket only.

    The loss is a sum over response tokens divided by their number over the whole batch, so neither
    the order nor the cut changes it; short rollouts just cost less.
    """
    order = np.argsort(np.asarray(rollout.lengths_B), kind="stable")
    host = jax.tree.map(np.asarray, rollout)
    longest_prompt = max(map(len, (*student_prompts, *teacher_prompts)))
    for start in range(0, len(order), micro_batch_size):
        rows = order[start : start + micro_batch_size]
        part = jax.tree.map(lambda leaf, rows=rows: leaf[rows], host)
        yield pair(
            part,
            [student_prompts[row] for row in rows],
            [teacher_prompts[row] for row in rows],
            prompt_width=fitting(prompt_buckets, longest_prompt),
            response_width=fitting(response_buckets, int(part.lengths_B.max())),
            pad_id=pad_id,
        )
