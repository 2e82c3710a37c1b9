"""What top-k leaves out: python scripts/bench_top_k.py --config configs/tiny.py [--k 5,20,50]

Samples the first batches of a run from its base model, and compares the reverse KL over the k
likeliest tokens and one bucket for the rest (loss.top_k) with that over the whole vocabulary: at
the base's own logits under the plain prompt and under the instruction. Prints one JSON object a
line:
  k               0 is the whole vocabulary
  kl              mean over the response tokens, in nats
  missing         share of the whole KL that the bucket hides
  gradient_error  of the gradient by the student's hidden states: norm of the difference, over the
                  norm of the whole KL's
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from opsdc_jax import cli, config, divergences, losses, rollout, sharding
from opsdc_jax.models import qwen3, weights
from opsdc_jax.objective import response_hidden, response_mask
from opsdc_jax.parts import Parts, batch_of, prepare
from opsdc_jax.rollout import DistillBatch
from opsdc_jax.sampling import SamplingParams


def main(argv: Sequence[str]) -> int:
    """Samples, then compares for every k."""
    values = cli.config_flag_values(argv)
    flags.DEFINE_list("k", "5,20,50", "tokens that are kept apart", flag_values=values)
    flags.DEFINE_integer("steps", 4, "batches that are sampled", flag_values=values)
    args = cli.parse(values, argv)
    config.validate(args.config)
    parts = prepare(args.config)
    cli.use_compilation_cache()
    params = weights.load_params(parts.folder, parts.model, shardings=parts.shardings)
    batches = list(sampled(args.config, parts, params, args.steps))
    tokens = sum(int(batch.lengths_B.sum()) for batch in batches)
    whole = measured(0, args.config, parts, params, batches)
    for k in (0, *map(int, args.k)):
        value, gradients = measured(k, args.config, parts, params, batches) if k else whole
        pairs = zip(gradients, whole[1], strict=True)
        error = np.sqrt(sum(np.sum((got - wanted) ** 2) for got, wanted in pairs))
        norm = np.sqrt(sum(np.sum(wanted**2) for wanted in whole[1]))
        result = {"benchmark": "top_k", "model": args.config.model.path, "tokens": tokens, "k": k}
        result |= {"kl": value / tokens, "missing": 1 - value / whole[0]}
        print(json.dumps(result | {"gradient_error": float(error / norm)}), flush=True)
    return cli.EXIT_DONE


def sampled(
    settings: ConfigDict, parts: Parts, params: qwen3.Params, steps: int
) -> Iterator[DistillBatch]:
    """The micro-batches of the first steps of a run, if it did not train, on the mesh."""
    options = settings.sampler
    sampling = SamplingParams(options.temperature, options.top_p, options.top_k)
    for step in range(1, steps + 1):
        asked = batch_of(settings, parts, step)
        for batch in rollout.micro_batches(
            parts.sampler(params, asked.student_prompts, asked.keys_B, sampling),
            asked.student_prompts,
            asked.teacher_prompts,
            micro_batch_size=settings.train.micro_batch_size,
            longest=options.max_prompt_tokens + options.max_response_tokens,
            pad_id=parts.tokenizer.pad_token_id,
        ):
            yield sharding.place(batch, sharding.batch_sharding(parts.mesh))


def measured(
    k: int,
    settings: ConfigDict,
    parts: Parts,
    params: qwen3.Params,
    batches: Sequence[DistillBatch],
) -> tuple[float, list[np.ndarray]]:
    """The KL summed over all tokens, and each micro-batch's gradient by its hidden states."""
    compare = make_compare(k, settings, parts)
    found = [jax.device_get(compare(params, batch)) for batch in batches]
    return float(sum(value for value, _ in found)), [gradient for _, gradient in found]


def make_compare(k: int, settings: ConfigDict, parts: Parts) -> Callable[..., Any]:
    """(parameters, batch) -> (summed KL, gradient [B, R, D]), both sides with the same weights."""
    divergence = divergences.choose("reverse_kl", k)

    def compare(params: qwen3.Params, batch: DistillBatch) -> tuple[jax.Array, jax.Array]:
        mask_BxR = response_mask(batch)

        def hidden(tokens_BxT: jax.Array, prompt_B: jax.Array) -> jax.Array:
            embedded, R = qwen3.embed(params, tokens_BxT), mask_BxR.shape[1]
            lengths_B = batch.lengths_B
            return response_hidden(
                params, parts.model, parts.mesh, embedded, prompt_B, lengths_B, R
            )

        def loss(student_BxRxD: jax.Array) -> jax.Array:
            head = qwen3.unembedding(params)
            return losses.divergence_sums(
                divergence,
                len(parts.tokenizer),
                settings.loss.chunk_tokens,
                parts.mesh,
                student_BxRxD,
                head,
                hidden(batch.teacher_BxT, batch.teacher_prompt_B),
                head,
                batch.response_BxR,
                batch.logprobs_BxR,
                jnp.ones(mask_BxR.shape, jnp.float32),
                mask_BxR,
            ).divergence

        student_BxRxD = hidden(batch.student_BxT, batch.student_prompt_B)
        return jax.value_and_grad(loss)(student_BxRxD)

    return jax.jit(compare)


if __name__ == "__main__":
    sys.exit(cli.run(main))
