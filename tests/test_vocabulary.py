"""The published vocabulary: 151,936 embedding rows, of which the tokenizer names 151,669."""

import dataclasses

import jax
import numpy as np
from helpers import SMALL

from opsdc_jax.models import qwen3
from opsdc_jax.sampler import EVAL_STREAM, Request, SamplingParams, generate, sequence_keys

ROWS, ENTRIES = 151_936, 151_669
WIDTH, RESPONSES = 16, 64  # tokens of a response; responses sampled at a time


def sampled_ids(count, beyond=1.0):
    """At least `count` ids from a model with random weights, nearly uniform over its vocabulary.

    Args:
      beyond: factor of the rows that the tokenizer does not name.
    """
    config = dataclasses.replace(SMALL, vocab_size=ROWS, hidden_size=8, num_hidden_layers=1)
    params = qwen3.init_params(config, jax.random.key(0))
    params["embedding"] = params["embedding"].at[ENTRIES:].multiply(beyond)
    ids = []
    for call in range(-(-count // (RESPONSES * WIDTH))):
        request = Request(
            prompts_BxP=np.arange(RESPONSES, dtype=np.int32)[:, None],
            prompt_lengths_B=np.ones(RESPONSES, np.int32),
            keys_B=sequence_keys(0, EVAL_STREAM, call, np.arange(RESPONSES)),
            sampling=SamplingParams(),
            stop_ids=np.array([-1], np.int32),
            pad_id=0,
        )
        out = generate(params, config, request, vocab_size=ENTRIES, response_width=WIDTH)
        ids.append(np.asarray(out.tokens_BxR).ravel())
    return np.concatenate(ids)


def test_rows_that_were_never_trained_are_never_sampled():
    """However likely they are. `python tests/measure_parity.py` draws 100,000 from random rows."""
    ids = sampled_ids(1024, beyond=1e4)
    assert len(np.unique(ids)) > 1000, "nearly uniform"
    assert 0.99 * ENTRIES < ids.max() < ENTRIES
