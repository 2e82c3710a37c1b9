"""The published vocabulary: 151,936 embedding rows, of which the tokenizer names 151,669."""

import dataclasses

import jax
import numpy as np
from helpers import SMALL

from opsdc_jax import sharding
from opsdc_jax.models import qwen3
from opsdc_jax.sampler import Sampler, decode_mesh
from opsdc_jax.sampling import EVAL_STREAM, SamplingParams, sequence_keys

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
    mesh = sharding.make_mesh({"replica": 1, "fsdp": 1, "tensor": -1})
    sampler = Sampler(
        model=config,
        mesh=decode_mesh(config, mesh, -1),
        prompt_buckets=(1,),
        response_width=WIDTH,
        vocab_size=ENTRIES,
        stop_ids=(-1,),
        pad_id=0,
    )
    prompts = [[row] for row in range(RESPONSES)]
    ids = []
    for call in range(-(-count // (RESPONSES * WIDTH))):
        keys = sequence_keys(0, EVAL_STREAM, call, np.arange(RESPONSES))
        out = sampler(params, prompts, keys, SamplingParams())
        ids.append(np.asarray(out.tokens_BxR).ravel())
    return np.concatenate(ids)


def test_rows_that_were_never_trained_are_never_sampled():
    """However likely they are. `python tests/measure_parity.py` draws 100,000 from random rows."""
    ids = sampled_ids(1024, beyond=1e4)
    assert len(np.unique(ids)) > 1000, "nearly uniform"
    assert 0.99 * ENTRIES < ids.max() < ENTRIES
