"""What the answers of a step's rollouts are worth: right or wrong, rewards, advantages.

OPSDC needs no answers. A gate (`loss.only_correct`) and the policy gradient do.

Shapes: B rows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from opsdc_jax import distributed, grading
from opsdc_jax.data import Example
from opsdc_jax.measures import is_thought_open, mark_ids, with_its_thought
from opsdc_jax.rollout import Rollout
from opsdc_jax.statistics import HEADLINE

ADVANTAGES = "advantages"


class Credit(NamedTuple):
    """What the loss makes of each rollout.

    Attributes:
      of_rows: [B] for `rollout.loss_weights`; None where all rows count alike.
      metrics: means over the rows, for metrics.jsonl.
    """

    of_rows: np.ndarray | None
    metrics: dict[str, float]


def needs_answers(loss: ConfigDict) -> bool:
    """Whether the loss grades the rollouts.

    Args:
      loss: the `loss` section of the run's configuration.
    """
    return loss.only_correct or loss.weights == ADVANTAGES


def credit(
    settings: ConfigDict,
    tokenizer: Any,
    examples: Sequence[Example],
    prompts: Sequence[Sequence[int]],
    sampled: Rollout,
) -> Credit:
    """Grades a step's rollouts, where the loss asks for it; called by all processes together.

    Args:
      settings: the whole configuration.
      examples: with answers, one for each rollout.
      prompts: that the rollouts answer, token ids.
      sampled: on the host.
    """
    loss = settings.loss
    if not needs_answers(loss):
        return Credit(None, {})
    right_B = is_right(tokenizer, examples, prompts, sampled)
    metrics = {"correct": float(np.mean(right_B))}
    if loss.only_correct:
        return Credit(right_B.astype(float), metrics)
    budget = settings.sampler.max_response_tokens
    rewards_B = rewards(right_B, sampled.lengths_B, loss.length_penalty, budget)
    return Credit(advantages(rewards_B), metrics | {"reward": float(np.mean(rewards_B))})


def is_right(
    tokenizer: Any,
    examples: Sequence[Example],
    prompts: Sequence[Sequence[int]],
    sampled: Rollout,
) -> np.ndarray:
    """Which rollouts commit to the right answer, as an evaluation grades them; bool [B].

    Graded in the first process, and known in all.
    """
    right_B = np.zeros(len(examples), np.int32)

    def grade() -> None:
        marks = mark_ids(tokenizer)
        items = []
        rows = zip(examples, prompts, sampled.tokens_BxR, sampled.lengths_B, strict=True)
        for (example, prompt, ids, length), stopped in zip(rows, sampled.stopped_B, strict=True):
            text = tokenizer.decode(ids[: length - stopped].tolist())
            text = with_its_thought(text, is_thought_open(prompt, *marks))
            items.append((text, example.answer, not stopped))
        right_B[:] = [graded.scores[HEADLINE] for graded in grading.grade_many(items)]

    with jax.transfer_guard("allow"):  # processes agree by way of their devices
        distributed.first_does(grade)
        return distributed.array_from_first(right_B).astype(bool)


def rewards(right_B: np.ndarray, lengths_B: np.ndarray, penalty: float, budget: int) -> np.ndarray:
    """1 for a right answer, less `penalty` times the share of its budget; 0 for a wrong one."""
    return right_B * (1 - penalty * lengths_B / budget)


def advantages(rewards_B: np.ndarray) -> np.ndarray:
    """Rewards against the batch's: their mean is 0, their standard deviation 1, or 0 if all tie."""
    return (rewards_B - rewards_B.mean()) / (rewards_B.std() + 1e-6)
