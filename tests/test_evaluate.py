"""Grading and statistics of sampled responses, with a sampler that answers by rule."""

import math

import jax
import numpy as np
import pytest

from opsdc_jax import evaluate
from opsdc_jax.data import Example
from opsdc_jax.evaluate import Answer
from opsdc_jax.rollout import Rollout
from opsdc_jax.sampler import SamplingParams

STOP = 7


class Parrot:
    """Tokenizer and sampler in one: the response to prompt [n] is `Answer : n`, n tokens long.

    Prompts of 5 and more are cut by the budget.
    """

    def __init__(self):
        self.batches = []
        self.keys = []

    def __call__(self, params, prompts, keys, sampling):
        self.batches.append([prompt[0] for prompt in prompts])
        self.keys.append(jax.random.key_data(keys))
        lengths = np.array([prompt[0] for prompt in prompts])
        tokens = np.full((len(prompts), 8), STOP)
        tokens[:, 0] = lengths
        return Rollout(tokens, lengths, lengths < 5, np.zeros(tokens.shape))

    def decode(self, ids):
        assert len(ids) == ids[0] - (ids[0] < 5), "the stop token is no part of the text"
        return f"<think> </think> Answer : {ids[0]}"


def answers(numbers, golds=None, batch_size=4):
    parrot = Parrot()
    examples = [
        Example(f"problem {number}", str(gold), "odd" if number % 2 else "even")
        for number, gold in zip(numbers, golds or numbers, strict=True)
    ]
    graded = evaluate.answer_all(
        None,
        parrot,
        parrot,
        examples,
        [[number] for number in numbers],
        sampling=SamplingParams(),
        seed=0,
        batch_size=batch_size,
    )
    return graded, parrot


def test_each_example_is_answered_once_in_order():
    numbers = [2, 3, 4, 2, 3, 4, 2, 3, 4, 6]
    graded, parrot = answers(numbers)
    assert [answer.tokens for answer in graded] == numbers
    assert {len(batch) for batch in parrot.batches} == {4}, "one shape: the last batch is filled up"
    assert graded[0] == Answer(
        "problem 2", "2", "even", "<think> </think> Answer : 2", 2, True, True
    )


def test_truncated_and_wrong_answers_do_not_count():
    graded, _ = answers([2, 3, 6], golds=[2, 4, 6])
    assert [answer.correct for answer in graded] == [True, False, False]
    assert [answer.stopped for answer in graded] == [True, True, False]


def test_statistics_by_level():
    graded, _ = answers([2, 3, 4, 6], golds=[2, 9, 4, 6])
    summary = evaluate.summarise(graded)
    overall = summary["overall"]
    assert overall["samples"] == 4
    assert overall["accuracy"] == 0.5
    assert overall["tokens"] == pytest.approx(15 / 4)
    assert overall["truncated"] == 0.25
    assert overall["tokens_se"] == pytest.approx(np.std([2, 3, 4, 6], ddof=1) / math.sqrt(4))
    assert overall["accuracy_se"] == pytest.approx(np.std([1, 0, 1, 0], ddof=1) / math.sqrt(4))
    assert set(summary["by_level"]) == {"even", "odd"}
    assert summary["by_level"]["even"]["samples"] == 3
    assert summary["by_level"]["odd"]["accuracy"] == 0


def test_systems_share_their_random_numbers():
    """Keys depend on the seed and on the example's index alone, not on the batch size."""
    (_, pairs), (_, fours) = (answers([2, 3, 4, 2], batch_size=size) for size in (2, 4))
    keys = np.concatenate(pairs.keys)
    np.testing.assert_array_equal(keys, np.concatenate(fours.keys))
    assert len({tuple(key) for key in keys.tolist()}) == 4
