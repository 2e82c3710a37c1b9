"""Where divergences pull: python scripts/bench_slopes.py --config configs/tiny_hard.py

Samples the first batches of a run from its base model and compares, at every response token, the
student q (the base at the plain prompt) with the teacher p (the base under the instruction). Forms
all logits of a micro-batch, so it is for small vocabularies. Prints one JSON object a line for each
group of tokens, with means over its tokens:
  group                 all; decided, where the student gives its likeliest word over 99%; open, the
                        others; against, decided and the teacher's likeliest word is another
  share                 of the tokens
  reverse_kl, ...       the divergence, in nats
  slope_of_reverse_kl   the sum of its absolute slopes by the student's logits, and so the others
"""

import json
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from opsdc_jax import cli, config, divergences, rollout, sharding
from opsdc_jax.divergences import Pair, moments
from opsdc_jax.models import qwen3, weights
from opsdc_jax.objective import response_hidden, response_mask
from opsdc_jax.parts import Parts, batch_of, prepare
from opsdc_jax.rollout import DistillBatch
from opsdc_jax.sampling import SamplingParams

NAMES = ("reverse_kl", "forward_kl", "jsd")
DECIDED = 0.99


def main(argv: Sequence[str]) -> int:
    """Samples, compares, prints the groups."""
    values = cli.config_flag_values(argv)
    flags.DEFINE_integer("steps", 4, "batches that are sampled", flag_values=values)
    args = cli.parse(values, argv)
    settings = args.config
    config.validate(settings)
    parts = prepare(settings)
    cli.use_compilation_cache()
    params = weights.load_params(parts.folder, parts.model, shardings=parts.shardings)
    options, compare = settings.sampler, make_compare(parts)
    sampling = SamplingParams(options.temperature, options.top_p, options.top_k)
    found = []
    for step in range(1, args.steps + 1):
        asked = batch_of(settings, parts, step)
        for batch in rollout.micro_batches(
            parts.sampler(params, asked.student_prompts, asked.keys_B, sampling),
            asked.student_prompts,
            asked.teacher_prompts,
            micro_batch_size=settings.train.micro_batch_size,
            longest=options.max_prompt_tokens + options.max_response_tokens,
            pad_id=parts.tokenizer.pad_token_id,
        ):
            batch = sharding.place(batch, sharding.batch_sharding(parts.mesh))
            table_NxF, mask_N = jax.device_get(compare(params, batch))
            found.append(table_NxF[mask_N])
    table_NxF = np.concatenate(found)
    decided_N, other_N = (table_NxF[:, column].astype(bool) for column in (-2, -1))
    groups = {
        "all": np.ones_like(decided_N),
        "open": ~decided_N,
        "decided": decided_N,
        "against": decided_N & other_N,
    }
    names = [*NAMES, *(f"slope_of_{name}" for name in NAMES)]
    for group, is_in_N in groups.items():
        result = {"benchmark": "slopes", "model": settings.model.path, "tokens": len(table_NxF)}
        result |= {"group": group, "share": float(is_in_N.mean())}
        if is_in_N.any():
            means = table_NxF[is_in_N].mean(axis=0)
            result |= {name: float(mean) for name, mean in zip(names, means, strict=False)}
        print(json.dumps(result), flush=True)
    return cli.EXIT_DONE


def make_compare(parts: Parts) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """(parameters, batch) -> a row for each position, [N, 8], and which are response tokens, [N].

    The columns: divergences, sums of absolute slopes, whether the student is decided, and whether
    the teacher's likeliest word is another than the student's.
    """
    vocab_size = len(parts.tokenizer)

    def compare(params: qwen3.Params, batch: DistillBatch) -> tuple[jax.Array, jax.Array]:
        mask_BxR = response_mask(batch)
        head, R = qwen3.unembedding(params), mask_BxR.shape[1]

        def logits_of(tokens_BxT: jax.Array, prompt_B: jax.Array) -> jax.Array:
            embedded = qwen3.embed(params, tokens_BxT)
            hidden_BxRxD = response_hidden(
                params, parts.model, parts.mesh, embedded, prompt_B, batch.lengths_B, R
            )
            logits = qwen3.logits(hidden_BxRxD, head, vocab_size)[..., :vocab_size]
            logits = logits.reshape(-1, vocab_size)
            return logits - jnp.max(logits, axis=-1, keepdims=True)

        student = logits_of(batch.student_BxT, batch.student_prompt_B)
        teacher = logits_of(batch.teacher_BxT, batch.teacher_prompt_B)
        pair = Pair(
            student,
            teacher,
            moments(student, teacher),
            moments(teacher, student),
            batch.response_BxR.reshape(-1),
            batch.logprobs_BxR.reshape(-1),
            lambda sums: sums,
        )
        ids_V = jnp.arange(vocab_size)
        values, slopes = [], []
        for name in NAMES:
            value_N, slopes_of = divergences.DIVERGENCES[name](pair)
            values.append(value_N)
            slopes.append(jnp.sum(jnp.abs(slopes_of(student, teacher, ids_V)), axis=-1))
        decided_N = jnp.max(jax.nn.softmax(student), axis=-1) > DECIDED
        other_N = jnp.argmax(student, axis=-1) != jnp.argmax(teacher, axis=-1)
        table_NxF = jnp.stack([*values, *slopes, decided_N, other_N], axis=-1)
        return table_NxF, mask_BxR.reshape(-1)

    return jax.jit(compare)


if __name__ == "__main__":
    sys.exit(cli.run(main))
