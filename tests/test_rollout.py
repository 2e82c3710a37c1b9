"""From sampled responses to train batches: plain numpy, checked token by token."""

import numpy as np
import pytest

from opsdc_jax.rollout import Rollout, fitting, left_pad, length_buckets, micro_batches, pair

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
        prompt_width=3,
        response_width=4,
        pad_id=PAD,
    )
    assert batch.student_BxT.tolist() == [
        [1, 0, 1, 2, PAD, PAD, PAD],
        [2, 3, 10, PAD, PAD, PAD, PAD],
    ]
    assert batch.teacher_BxT.tolist() == [
        [4, 5, 6, 0, 1, 2, PAD],
        [7, 10, PAD, PAD, PAD, PAD, PAD],
    ]
    assert batch.student_prompt_B.tolist() == [1, 2]
    assert batch.teacher_prompt_B.tolist() == [3, 1]
    assert batch.lengths_B.tolist() == [3, 1]
    assert batch.response_BxR.shape == batch.logprobs_BxR.shape == (2, 4)


def test_micro_batches_sort_by_length_and_pad_to_their_own_bucket():
    lengths = [8, 1, 5, 2]
    batches = list(
        micro_batches(
            rollout(lengths),
            [[row] for row in range(4)],
            [[row, row] for row in range(4)],
            micro_batch_size=2,
            prompt_buckets=(1, 2, 3),
            response_buckets=(2, 4, 8),
            pad_id=PAD,
        )
    )
    assert [batch.response_BxR.shape for batch in batches] == [(2, 2), (2, 8)]
    assert [batch.student_BxT.shape for batch in batches] == [(2, 4), (2, 10)]
    assert [batch.lengths_B.tolist() for batch in batches] == [[1, 2], [5, 8]]
    rows = [batch.student_BxT[:, 0].tolist() for batch in batches]
    assert rows == [[1, 3], [2, 0]]  # each prompt stays with its response
    assert batches[0].response_BxR[0, 0] == 10
