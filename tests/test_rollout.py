"""From sampled responses to train batches: plain numpy, checked token by token."""

import itertools

import numpy as np
import pytest
from helpers import load_config

from opsdc_jax.rollout import (
    Rollout,
    fitting,
    left_pad,
    length_buckets,
    loss_weights,
    micro_batches,
    padding_efficiency,
    pair,
    row_widths,
)
from opsdc_jax.tiny.task import make_problem, write_response
from opsdc_jax.tiny.worlds import draw_style

PAD = 99


def rollout(lengths, width=8):
    rows = [[10 * row + column for column in range(width)] for row in range(len(lengths))]
    return Rollout(
        tokens_BxR=np.array(rows, np.int32),
        lengths_B=np.array(lengths, np.int32),
        stopped_B=np.array(lengths) < width,
        logprobs_BxR=-np.array(rows, np.float32),
    )


def test_left_pad_aligns_prompts_on_the_right():
    assert left_pad([[1, 2], [3]], 3, PAD).tolist() == [[PAD, 1, 2], [PAD, PAD, 3]]


@pytest.mark.parametrize(("tokens", "expected"), [(1, 4), (4, 4), (5, 8), (8, 8)])
def test_the_narrowest_bucket_that_fits(tokens, expected):
    assert fitting((4, 8), tokens) == expected


def test_nothing_is_ever_cut():
    with pytest.raises(ValueError, match="9 tokens do not fit into 8"):
        fitting((4, 8), 9)


@pytest.mark.parametrize(
    ("most", "expected"), [(160, (20, 40, 80, 160)), (10, (2, 3, 5, 10)), (1, (1,)), (3, (1, 2, 3))]
)
def test_length_buckets_end_at_the_budget(most, expected):
    assert length_buckets(most) == expected


def test_pair_puts_the_sampled_ids_after_both_prompts_and_adds_nothing():
    batch = pair(
        rollout([3, 1]),
        [[1], [2, 3]],
        [[4, 5, 6], [7]],
        student_width=6,
        teacher_width=7,
        response_width=4,
        pad_id=PAD,
    )
    assert batch.student_BxT.tolist() == [
        [1, 0, 1, 2, PAD, PAD],
        [2, 3, 10, PAD, PAD, PAD],
    ]
    assert batch.teacher_BxT.tolist() == [
        [4, 5, 6, 0, 1, 2, PAD],
        [7, 10, PAD, PAD, PAD, PAD, PAD],
    ]
    assert batch.student_prompt_B.tolist() == [1, 2]
    assert batch.teacher_prompt_B.tolist() == [3, 1]
    assert batch.lengths_B.tolist() == [3, 1]
    assert batch.response_BxR.shape == batch.logprobs_BxR.shape == (2, 4)


def test_row_widths_are_few_and_close():
    assert row_widths(200) == (30, 36, 44, 50, 60, 72, 86, 100, 120, 142, 170, 200)
    wide = row_widths(1024 + 8192)
    assert len(wide) == 12
    assert all(width % 128 == 0 for width in wide)
    assert all(left < right <= 1.25 * left for left, right in itertools.pairwise(wide))
    assert row_widths(3) == (2, 3)


def test_micro_batches_sort_by_row_length_and_pad_to_their_own_width():
    lengths = [8, 1, 5, 2]
    student_prompts = [[row] * (10 * row + 1) for row in range(4)]
    batches = micro_batches(
        rollout(lengths),
        student_prompts,
        [[*prompt, 7, 7, 7, 7, 7] for prompt in student_prompts],
        micro_batch_size=2,
        longest=50,
        pad_id=PAD,
    )
    # Rows are 9, 12, 26 and 33 tokens long; the teacher's are 5 longer, rounded up to 6.
    assert [batch.student_BxT.shape for batch in batches] == [(2, 12), (2, 36)]
    assert [batch.teacher_BxT.shape for batch in batches] == [(2, 18), (2, 42)]
    assert [batch.lengths_B.tolist() for batch in batches] == [[8, 1], [5, 2]]
    rows = [batch.student_BxT[:, 0].tolist() for batch in batches]
    assert rows == [[0, 1], [2, 3]], "each prompt stays with its response"
    assert batches[0].response_BxR[1, 0] == 10
    tokens = (9 + 12 + 26 + 33) * 2 + 4 * 5
    assert padding_efficiency(batches) == tokens / (2 * (12 + 18 + 36 + 42))


@pytest.mark.parametrize(
    ("rule", "weights", "shares"),
    [
        ("tokens", [1, 1, 0, 1], [4, 1, 0, 0]),
        ("sequences", [1 / 4, 1, 0, 1], [1, 1, 0, 0]),
        ("micro_batches", [1 / 5, 1 / 5, 0, 1 / 5], [4 / 5, 1 / 5, 0, 0]),
        ("advantages", [1, 1, 0, 1], [4, 1, 3, 0]),
    ],
)
def test_loss_weights(rule, weights, shares):
    """Of two rows that count, one without credit, and one of padding."""
    got = loss_weights(rule, np.array([4, 1, 3, 0]), np.array([1, 1, 0, 1]))
    np.testing.assert_allclose(got, (weights, shares), rtol=1e-6)
    assert {array.dtype for array in got} == {np.dtype("float32")}


@pytest.mark.parametrize("instruction", [None, "v1"], ids=["verbose", "concise"])
def test_padding_is_little_on_the_lengths_of_the_tiny_task(instruction):
    """Its own responses, in the batches and micro-batches of configs/tiny.py."""
    settings = load_config("tiny")
    longest = settings.sampler.max_prompt_tokens + settings.sampler.max_response_tokens
    rng, size = np.random.default_rng(0), settings.train.batch_size
    efficiencies, shapes = [], set()
    for step in range(8):
        problems = [make_problem(0, step * size + row, split="train") for row in range(size)]
        texts = [
            write_response(problem, draw_style(rng, instruction, problem.level), rng)
            for problem in problems
        ]
        budget = settings.sampler.max_response_tokens
        lengths = [min(budget, len(text.split()) + 1) for text in texts]
        prompts = [[1] * (len(problem.text.split()) + 4) for problem in problems]
        batches = micro_batches(
            rollout(lengths, budget),
            prompts,
            [[*prompt, *[2] * 10] for prompt in prompts],
            micro_batch_size=settings.train.micro_batch_size,
            longest=longest,
            pad_id=PAD,
        )
        efficiencies.append(padding_efficiency(batches))
        shapes |= {(batch.student_BxT.shape, batch.teacher_BxT.shape) for batch in batches}
    assert min(efficiencies) >= 0.8
    assert len(shapes) <= len(row_widths(longest)) == 12
