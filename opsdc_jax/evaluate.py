"""Accuracy and length of one system on a set of problems, overall and by difficulty."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from opsdc_jax import grading
from opsdc_jax.data.sources import Example
from opsdc_jax.models.qwen3 import Params
from opsdc_jax.sampler import EVAL_STREAM, Sampler, SamplingParams, sequence_keys


class Answer(NamedTuple):
    """One graded response.

    Attributes:
      response: text without the end-of-sequence token.
      tokens: sampled tokens, the end-of-sequence token included.
      stopped: False where the budget cut the response.
    """

    problem: str
    gold: str
    level: str
    response: str
    tokens: int
    stopped: bool
    correct: bool


def answer_all(
    params: Params,
    sampler: Sampler,
    tokenizer: Any,
    examples: Sequence[Example],
    prompts: Sequence[Sequence[int]],
    *,
    sampling: SamplingParams,
    seed: int,
    batch_size: int,
) -> list[Answer]:
    """Samples and grades one response for each prompt.

    The keys depend on the seed and on the example's index alone, so systems compared on the same
    examples share their random numbers.

    Args:
      prompts: token ids, one prompt for each example.
      batch_size: responses sampled at a time; the last batch is filled up and the filling dropped.
    """
    answers = []
    for start in range(0, len(examples), batch_size):
        indices = [index % len(examples) for index in range(start, start + batch_size)]
        keys = sequence_keys(seed, EVAL_STREAM, 0, np.array(indices))
        rollout = jax.device_get(
            sampler(params, [prompts[index] for index in indices], keys, sampling)
        )
        for row, index in enumerate(indices[: len(examples) - start]):
            example, length = examples[index], int(rollout.lengths_B[row])
            stopped = bool(rollout.stopped_B[row])
            text = tokenizer.decode(rollout.tokens_BxR[row, : length - stopped])
            correct = grading.grade(text, example.answer, not stopped)["committed"]
            answers.append(
                Answer(
                    problem=example.problem,
                    gold=example.answer,
                    level=example.level,
                    response=text,
                    tokens=length,
                    stopped=stopped,
                    correct=correct,
                )
            )
    return answers


def summarise(answers: Sequence[Answer]) -> dict[str, Any]:
    """Statistics of `answers`: {"overall": ..., "by_level": {level: ...}}, see `statistics`."""
    by_level: dict[str, list[Answer]] = {}
    for answer in answers:
        by_level.setdefault(answer.level, []).append(answer)
    return {
        "overall": statistics(answers),
        "by_level": {level: statistics(group) for level, group in by_level.items()},
    }


def statistics(answers: Sequence[Answer]) -> dict[str, float | int]:
    """Means over responses and their standard errors.

    `accuracy` and `truncated` are fractions; `tokens` is the mean response length.
    """
    accuracy, accuracy_se = _mean_and_error([answer.correct for answer in answers])
    tokens, tokens_se = _mean_and_error([answer.tokens for answer in answers])
    return {
        "samples": len(answers),
        "accuracy": accuracy,
        "accuracy_se": accuracy_se,
        "tokens": tokens,
        "tokens_se": tokens_se,
        "truncated": float(np.mean([not answer.stopped for answer in answers])),
    }


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    array = np.asarray(values, float)
    deviation = array.std(ddof=1) if len(array) > 1 else math.nan
    return float(array.mean()), float(deviation / math.sqrt(len(array)))
