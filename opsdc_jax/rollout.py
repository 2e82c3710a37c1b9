"""The two typed pytrees between the sampler and the train step, and how one becomes the other.

Token ids are the only currency: the trainer sees the ids that were sampled, never re-encoded text,
and no token is added that was not sampled.

Shapes: B rows, R response width, T row width (prompt and response; each side has its own).
"""

import dataclasses
import math
from collections.abc import Sequence
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
      weights_B: float32, of each response token of the row in the loss, see `loss_weights`.
      shares_B: float32, what the row adds to the denominator of the loss.
    """

    student_BxT: Array
    teacher_BxT: Array
    student_prompt_B: Array
    teacher_prompt_B: Array
    response_BxR: Array
    lengths_B: Array
    logprobs_BxR: Array
    weights_B: Array
    shares_B: Array


def left_pad(prompts: Sequence[Sequence[int]], width: int, pad_id: int) -> np.ndarray:
    """Prompts of at most `width` tokens as one [B, width] int32 array, right-aligned."""
    padded = np.full((len(prompts), width), pad_id, np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[width - len(prompt) :] = prompt
    return padded


def length_buckets(max_tokens: int) -> tuple[int, ...]:
    """The widths that the sampler pads prompts to: the budget, its half, quarter, eighth.

    A handful of widths, ascending, bounds the number of compilations.
    """
    return tuple(sorted({-(-max_tokens // parts) for parts in (1, 2, 4, 8)}))


def row_widths(longest: int) -> tuple[int, ...]:
    """The widths that the student's training rows are padded to, ascending.

    `longest`, and eleven more, each a sixth below the next (a factor of 2**(1/4)): rounding a row
    up adds less than a tenth on average, and a run compiles the train step at most twelve times, as
    a rule half of that. Wide rows are rounded to the 128 that kernels want.

    Args:
      longest: the budgets of prompt and response together, in tokens.
    """
    step = _step(longest)
    widths = (math.ceil(longest / 2 ** (part / 4) / step) * step for part in range(12))
    return tuple(sorted({min(width, longest) for width in widths}))


def _step(longest: int) -> int:
    """What widths are multiples of, for rows of at most `longest` tokens."""
    return 128 if longest >= 1024 else 2


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
    student_width: int,
    teacher_width: int,
    response_width: int,
    pad_id: int,
    weights: str = "tokens",
    credit_B: np.ndarray | None = None,
) -> DistillBatch:
    """Joins host-side responses to both prompts.

    Args:
      rollout: numpy arrays, one row for each prompt.
      student_width, teacher_width: at least the longest prompt and response of that side.
      response_width: at least the longest response.
      weights, credit_B: see `loss_weights`; None is a credit of 1 for all rows.
    """
    lengths = np.asarray(rollout.lengths_B).astype(np.int32)
    credit = np.ones(len(lengths)) if credit_B is None else credit_B
    weights_B, shares_B = loss_weights(weights, lengths, credit)

    def padded(rows: Sequence[Sequence[int]], width: int, dtype: Any, fill: float) -> np.ndarray:
        out = np.full((len(lengths), width), fill, dtype)
        for target, row in zip(out, rows, strict=True):
            target[: len(row)] = row
        return out

    def cut(values_BxR: Array) -> list[Sequence[Any]]:
        return [row[:length] for row, length in zip(values_BxR, lengths, strict=True)]

    responses = cut(rollout.tokens_BxR)

    def joined(prompts: Sequence[Sequence[int]], width: int) -> np.ndarray:
        rows = [[*prompt, *ids] for prompt, ids in zip(prompts, responses, strict=True)]
        return padded(rows, width, np.int32, pad_id)

    return DistillBatch(
        student_BxT=joined(student_prompts, student_width),
        teacher_BxT=joined(teacher_prompts, teacher_width),
        student_prompt_B=np.array([len(prompt) for prompt in student_prompts], np.int32),
        teacher_prompt_B=np.array([len(prompt) for prompt in teacher_prompts], np.int32),
        response_BxR=padded(responses, response_width, np.int32, pad_id),
        lengths_B=lengths,
        logprobs_BxR=padded(cut(rollout.logprobs_BxR), response_width, np.float32, 0.0),
        weights_B=weights_B,
        shares_B=shares_B,
    )


def loss_weights(
    rule: str, lengths_B: np.ndarray, credit_B: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How the tokens of a micro-batch are averaged: each row's weight of a token, and its share.

    The loss is the sum of weight * divergence over the tokens of all micro-batches of a step, over
    the sum of the shares of all their rows.

    Args:
      rule: "tokens", the mean over the tokens of the step (OPSDC, arXiv 2603.05433); "sequences",
        the mean of the rows' own means; "micro_batches", the mean of the micro-batches' means, in
        which a token counts the less the more tokens its micro-batch has; or "advantages", in which
        a row's tokens are weighted by its credit, and all of them are counted.
      credit_B: of the rows; but for "advantages" 0 leaves a row out and 1 keeps it.

    Returns:
      float32 weights_B and shares_B.
    """
    if rule == "advantages":
        return credit_B.astype(np.float32), lengths_B.astype(np.float32)
    counted_B = credit_B * lengths_B
    divisors = {"tokens": 1, "sequences": lengths_B, "micro_batches": counted_B.sum()}
    divisor = np.maximum(divisors[rule], 1)
    return (credit_B / divisor).astype(np.float32), (counted_B / divisor).astype(np.float32)


def micro_batches(
    rollout: Rollout,
    student_prompts: Sequence[Sequence[int]],
    teacher_prompts: Sequence[Sequence[int]],
    *,
    micro_batch_size: int,
    longest: int,
    pad_id: int,
    weights: str = "tokens",
    credit_B: np.ndarray | None = None,
) -> list[DistillBatch]:
    """Cuts a batch into micro-batches of rows of similar length, each padded to its own width only.

    The loss is a weighted sum over response tokens divided by a sum over the rows of the whole
    batch, so neither the order nor the cut changes it, but where `weights` is "micro_batches";
    short rollouts just cost less.

    A micro-batch's width is chosen once, for the student's rows (`row_widths`); the teacher's are
    wider by what the instruction adds, which is the same for all prompts of a run, and so the
    number of shapes is the number of widths.

    Args:
      longest: the budgets of prompt and response together, in tokens.
      weights, credit_B: as in `pair`.
    """
    host = jax.tree.map(np.asarray, rollout)
    student_T, teacher_T = (
        np.array([len(prompt) for prompt in prompts]) + host.lengths_B
        for prompts in (student_prompts, teacher_prompts)
    )
    extra = _extra(teacher_T - student_T, longest)
    needed = np.maximum(student_T, teacher_T - extra)
    order = np.argsort(needed, kind="stable")
    batches = []
    for start in range(0, len(order), micro_batch_size):
        rows = order[start : start + micro_batch_size]
        width = fitting(row_widths(longest), int(needed[rows].max()))
        batches.append(
            pair(
                jax.tree.map(lambda leaf, rows=rows: leaf[rows], host),
                [student_prompts[row] for row in rows],
                [teacher_prompts[row] for row in rows],
                student_width=width,
                teacher_width=width + extra,
                response_width=min(width, host.tokens_BxR.shape[1]),
                pad_id=pad_id,
                weights=weights,
                credit_B=None if credit_B is None else credit_B[rows],
            )
        )
    return batches


def _extra(more_B: np.ndarray, longest: int) -> int:
    """What the teacher's rows are wider by, from how much longer each of its prompts is."""
    step = _step(longest)
    return max(0, math.ceil(more_B.max() / step) * step)


def abstract_batches(
    student_prompts: Sequence[Sequence[int]],
    teacher_prompts: Sequence[Sequence[int]],
    *,
    micro_batch_size: int,
    longest: int,
    response_width: int,
) -> list[DistillBatch]:
    """All that `micro_batches` can give in a run, widest first, as shapes and dtypes.

    Args:
      student_prompts, teacher_prompts: of any batch of the run.
      response_width: of the rollouts' arrays.
    """
    sides = zip(student_prompts, teacher_prompts, strict=True)
    extra = _extra(np.array([len(theirs) - len(ours) for ours, theirs in sides]), longest)

    def tokens(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, np.int32)

    def numbers(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, np.float32)

    B, batches = micro_batch_size, []
    for width in reversed(row_widths(longest)):
        R = min(width, response_width)
        batches.append(
            DistillBatch(
                student_BxT=tokens(B, width),
                teacher_BxT=tokens(B, width + extra),
                student_prompt_B=tokens(B),
                teacher_prompt_B=tokens(B),
                response_BxR=tokens(B, R),
                lengths_B=tokens(B),
                logprobs_BxR=numbers(B, R),
                weights_B=numbers(B),
                shares_B=numbers(B),
            )
        )
    return batches


def padding_efficiency(batches: Sequence[DistillBatch]) -> float:
    """Tokens over computed positions of both sides' rows, prompts included: 1 is no padding."""
    tokens = sum(
        int(np.sum(batch.student_prompt_B + batch.teacher_prompt_B + 2 * batch.lengths_B))
        for batch in batches
    )
    return tokens / sum(batch.student_BxT.size + batch.teacher_BxT.size for batch in batches)
