"""Prints how far the package is from its references, one JSON object a line.

    python tests/measure_parity.py

The tests assert bounds on the same figures; this shows the figures themselves.
"""

import json

import hf_reference
import numpy as np
from helpers import relative_error
from test_losses import MASK, WEIGHTS, brute_force, chunked
from test_qwen3 import all_logits, relative_gap
from test_sampler import NEW_TOKENS, PAD_ID, PROMPT_WIDTH, sample, trainers_logprobs
from test_vocabulary import ENTRIES, sampled_ids

from opsdc_jax import rollout
from opsdc_jax.config import DIVERGENCE_NAMES
from opsdc_jax.sampling import SamplingParams


def logits(name: str) -> float:
    """Largest difference to transformers' logits over the largest logit."""
    model = hf_reference.load(name)
    given = model.inputs
    got = all_logits(model.params, model.config, given.tokens, given.positions, given.valid)
    expected = hf_reference.reference(name, "golden")["logits"]
    return relative_gap(np.asarray(got)[given.valid], expected[given.valid])


def logprob_gap(name: str) -> float:
    """Largest difference of the sampler's and the trainer's log-probabilities, temperature 1."""
    model = hf_reference.load(name)
    sampled = sample(model, SamplingParams())
    batch = rollout.pair(
        sampled,
        model.inputs.prompts,
        model.inputs.prompts,
        student_width=PROMPT_WIDTH + NEW_TOKENS,
        teacher_width=PROMPT_WIDTH + NEW_TOKENS,
        response_width=NEW_TOKENS,
        pad_id=PAD_ID,
    )
    trained = trainers_logprobs(model.params, model.config, batch, model.entries)
    return float(np.abs(np.asarray(trained) - sampled.logprobs_BxR).max())


def main() -> None:
    """Prints all figures."""
    for name in hf_reference.CASES:
        print(json.dumps({"measured": "logits", "model": name, "relative": logits(name)}))
        print(json.dumps({"measured": "logprob_gap", "model": name, "max": logprob_gap(name)}))
    for name in DIVERGENCE_NAMES:
        expected, expected_gradients = brute_force(name)
        sums, gradients = chunked(name, 16)
        total = (expected * WEIGHTS)[MASK].sum()
        figures = {
            "mean": float(expected[MASK].mean()),
            "loss_relative": abs(float(sums.divergence) - total) / total,
            "gradient_relative": relative_error(gradients, expected_gradients),
        }
        print(json.dumps({"measured": name} | figures))
    ids = sampled_ids(100_000)
    beyond = int((ids >= ENTRIES).sum())
    print(json.dumps({"measured": "vocabulary", "samples": len(ids), "beyond_tokenizer": beyond}))


if __name__ == "__main__":
    main()
