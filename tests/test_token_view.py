"""The token view: the loss's own numbers, token by token, and text that joins up again."""

import functools
import json

import jax
import numpy as np
import pytest
from helpers import SMALL, random_params
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opsdc_jax import divergences, losses, objective, sharding, token_view
from opsdc_jax.models import hf, qwen3
from opsdc_jax.rollout import Rollout, pair
from opsdc_jax.tiny import BASE_FOLDER
from opsdc_jax.token_view import CHOICES, TokenViewer

ENTRIES = 37  # of the tokenizer; the embedding has 40 rows
LENGTHS = [5, 12, 1]
STUDENT, TEACHER = (random_params(SMALL, seed) for seed in (0, 1))
MESH = sharding.make_mesh({"replica": 1, "fsdp": 1, "tensor": 1})
DRAWN = np.random.default_rng(0)
SAMPLED = Rollout(
    tokens_BxR=DRAWN.integers(0, ENTRIES, (3, 12)).astype(np.int32),
    lengths_B=np.array(LENGTHS, np.int32),
    stopped_B=np.array([True, False, True]),
    logprobs_BxR=np.zeros((3, 12), np.float32),
)
STUDENT_PROMPTS = [DRAWN.integers(0, ENTRIES, n).tolist() for n in (4, 2, 3)]
TEACHER_PROMPTS = [DRAWN.integers(0, ENTRIES, n).tolist() for n in (6, 5, 7)]
BATCH = pair(
    SAMPLED,
    STUDENT_PROMPTS,
    TEACHER_PROMPTS,
    student_width=19,
    teacher_width=19,
    response_width=12,
    pad_id=0,
)
MASK = np.arange(12) < np.array(LENGTHS)[:, None]


class Numbers:
    """A tokenizer whose words are the ids."""

    def decode(self, ids):
        return " ".join(map(str, ids))


@functools.cache
def comparison(chunk):
    return token_view.make_compare(
        SMALL, chunk=chunk, vocab_size=ENTRIES, shardings=qwen3.shardings(SMALL, MESH)
    )


@functools.cache
def views(chunk=8):
    return jax.device_get(comparison(chunk)(STUDENT, TEACHER, BATCH))


@functools.cache
def hidden():
    """The hidden states that predict the responses, of student and teacher: [3, 12, 32] each."""
    states = jax.jit(
        lambda params, tokens, prompt: objective.response_hidden(
            params, SMALL, None, qwen3.embed(params, tokens), prompt, BATCH.lengths_B, 12
        )
    )
    return (
        states(STUDENT, BATCH.student_BxT, BATCH.student_prompt_B),
        states(TEACHER, BATCH.teacher_BxT, BATCH.teacher_prompt_B),
    )


def float64_log_probs(states, params):
    """Dense log-probabilities over the tokenizer's entries, from float32 hidden states."""
    states = np.asarray(states, np.float64)
    logits = states @ np.asarray(qwen3.unembedding(params), np.float64)[:ENTRIES].T
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_the_tokens_kl_add_up_to_the_loss():
    student, teacher = hidden()
    sums = losses.divergence_sums(
        divergences.reverse_kl,
        ENTRIES,
        8,
        None,
        student,
        qwen3.unembedding(STUDENT),
        teacher,
        qwen3.unembedding(TEACHER),
        BATCH.response_BxR,
        BATCH.logprobs_BxR,
        np.ones(MASK.shape, np.float32),
        MASK,
    )
    found = views()
    assert sums.divergence > 1
    assert found.kl[MASK].sum() == pytest.approx(float(sums.divergence), rel=1e-5)
    for side in ("student_entropy", "teacher_entropy"):
        expected = float(getattr(sums, side))
        assert getattr(found, side)[MASK].sum() == pytest.approx(expected, rel=1e-5)


def test_every_number_matches_float64():
    found = views()
    log_q, log_p = map(float64_log_probs, hidden(), (STUDENT, TEACHER))
    q, p = np.exp(log_q), np.exp(log_p)
    np.testing.assert_allclose(
        found.kl[MASK], (q * (log_q - log_p)).sum(-1)[MASK], rtol=1e-5, atol=1e-6
    )
    for side, probs in (("student", q), ("teacher", p)):
        entropy = -(probs * np.log(probs)).sum(-1)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        close(getattr(found, f"{side}_entropy")[MASK], entropy[MASK])
        sampled = np.take_along_axis(probs, BATCH.response_BxR[:, :, None], -1)[:, :, 0]
        close(getattr(found, f"{side}_prob")[MASK], sampled[MASK])
        ids = np.argsort(-probs, axis=-1)[:, :, :CHOICES]
        np.testing.assert_array_equal(getattr(found, f"{side}_ids")[MASK], ids[MASK])
        close(getattr(found, f"{side}_probs")[MASK], np.take_along_axis(probs, ids, -1)[MASK])


def test_the_chunk_changes_nothing():
    for one, other in zip(views(8), views(1000), strict=True):
        np.testing.assert_allclose(one[MASK], other[MASK], rtol=1e-5, atol=1e-6)


def test_no_logits_of_all_positions_exist():
    """36 positions in chunks of 4: no array holds a row of the vocabulary for each position."""
    text = comparison(4).lower(STUDENT, TEACHER, BATCH).as_text()
    assert "tensor<4x40xf32>" in text
    for rows in ("36x40", "3x12x40", "9x4x40"):
        assert f"tensor<{rows}xf32>" not in text


def viewed(rows_at_a_time, *arguments, count):
    viewer = TokenViewer(
        comparison(8), Numbers(), sharding.batch_sharding(MESH), rows_at_a_time, 7, 12, 0
    )
    return viewer.finish(viewer.start(*arguments, count))


@pytest.mark.parametrize("rows_at_a_time", [2, 4])
def test_the_viewer_gives_the_first_rollouts_however_they_are_cut(rows_at_a_time):
    prompts = STUDENT_PROMPTS, TEACHER_PROMPTS
    found = viewed(rows_at_a_time, STUDENT, TEACHER, SAMPLED, *prompts, count=9)
    assert [len(rollout["tokens"]) for rollout in found] == LENGTHS
    for row, rollout in enumerate(found):
        length = LENGTHS[row]
        assert rollout["kl"] == pytest.approx(views().kl[row, :length].tolist(), rel=1e-4)
        assert "".join(rollout["tokens"]) == Numbers().decode(SAMPLED.tokens_BxR[row, :length])
        assert [len(choices) for choices in rollout["student_top"]] == [CHOICES] * length
        text, prob = rollout["teacher_top"][0][0]
        assert text == str(views().teacher_ids[row, 0, 0])
        assert prob == pytest.approx(float(views().teacher_probs[row, 0, 0]), rel=1e-2)
        assert json.loads(json.dumps(rollout)) == rollout
    assert len(viewed(rows_at_a_time, STUDENT, TEACHER, SAMPLED, *prompts, count=2)) == 2
    assert viewed(rows_at_a_time, STUDENT, TEACHER, SAMPLED, *prompts, count=0) == []


def test_equal_sides_have_no_divergence():
    prompts = STUDENT_PROMPTS, STUDENT_PROMPTS
    for rollout in viewed(3, STUDENT, STUDENT, SAMPLED, *prompts, count=3):
        assert max(map(abs, rollout["kl"])) <= 1e-6
        assert rollout["student_top"] == rollout["teacher_top"]


def byte_tokenizer():
    """One token a byte: every character beyond ASCII is shared by several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


def test_pieces_of_words_join_to_the_text():
    tokenizer = hf.load_tokenizer(BASE_FOLDER)
    text = "<think> 33 + 9 = 42 . </think> Answer : 42 <|im_end|>"
    found = token_view.pieces(tokenizer, tokenizer.encode(text))
    assert found[:3] == ["<think>", " 33", " +"]
    assert "".join(found) == text


def test_a_character_of_several_tokens_stands_at_its_last():
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("a√2 …é")
    found = token_view.pieces(tokenizer, ids)
    assert found == ["a", "", "", "√", "2", " ", "", "", "…", "", "é"]
    cut = token_view.pieces(tokenizer, ids[:-1])
    assert cut[-1] == "\N{REPLACEMENT CHARACTER}", "cut inside a character, it says so"
