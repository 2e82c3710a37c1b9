"""Grades of rollouts, and what the loss makes of them."""

import numpy as np
import pytest
from helpers import load_config

from opsdc_jax import rewards
from opsdc_jax.data import Example
from opsdc_jax.measures import THINK
from opsdc_jax.models import hf
from opsdc_jax.rollout import Rollout
from opsdc_jax.tiny import BASE_FOLDER

EXAMPLES = [Example("start 3 + 4", "7", "easy")] * 5
# Right; wrong; right inside a thought only; right, but cut at the budget; right.
TEXTS = (
    "<think> 3 + 4 = 7 . </think> Answer : 7 <|im_end|>",
    "<think> </think> Answer : 8 <|im_end|>",
    "<think> Answer : 7 <|im_end|>",
    "<think> </think> Answer : 7",
    "Answer : 7 <|im_end|>",
)
BUDGET = 20


@pytest.fixture(scope="module")
def tokenizer():
    return hf.load_tokenizer(BASE_FOLDER)


@pytest.fixture(scope="module")
def sampled(tokenizer):
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), BUDGET), np.int32)
    for target, row in zip(tokens, rows, strict=True):
        target[: len(row)] = row
    stopped = np.array([text.endswith("<|im_end|>") for text in TEXTS])
    return Rollout(tokens, lengths, stopped, np.zeros(tokens.shape, np.float32))


def credit(tokenizer, sampled, **loss):
    settings = load_config("tiny")
    settings.sampler.max_response_tokens = BUDGET
    settings.loss.update(loss)
    return rewards.credit(settings, tokenizer, EXAMPLES, [[1]] * len(TEXTS), sampled)


def test_the_method_itself_grades_nothing(sampled):
    assert credit(None, sampled) == (None, {})


def test_the_gate_keeps_what_commits_to_the_right_answer(tokenizer, sampled):
    found = credit(tokenizer, sampled, only_correct=True)
    assert found.of_rows.tolist() == [1, 0, 0, 0, 1]
    assert found.metrics == {"correct": 0.4}


def test_a_prompt_that_opens_a_thought_counts_as_part_of_it(tokenizer, sampled):
    prompts = [[tokenizer.get_vocab()[THINK]]] * len(TEXTS)
    right = rewards.is_right(tokenizer, EXAMPLES, prompts, sampled)
    assert right.tolist() == [True, False, False, False, False]


def test_advantages_are_rewards_in_standard_deviations(tokenizer, sampled):
    found = credit(tokenizer, sampled, weights="advantages", length_penalty=0.5)
    assert sampled.lengths_B[[0, 4]].tolist() == [12, 4]
    expected = np.array([1 - 0.5 * 12 / BUDGET, 0, 0, 0, 1 - 0.5 * 4 / BUDGET])
    assert found.metrics == {"correct": 0.4, "reward": pytest.approx(expected.mean())}
    assert found.of_rows.mean() == pytest.approx(0, abs=1e-6)
    assert found.of_rows.std() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(
        found.of_rows - found.of_rows[1], (expected - expected[1]) / expected.std(), rtol=1e-4
    )


def test_equal_rewards_have_no_advantage():
    assert rewards.advantages(np.full(4, 0.7)).tolist() == [0, 0, 0, 0]
