"""Memory and time of the loss: python scripts/bench_kl.py [--tokens 8192] [--time]

Compiles the loss and its gradients as training has them, in chunks, beside the plain way: the
log-probabilities of all tokens at once, differentiated by JAX. Prints one JSON object:
  chunked, dense  GiB of temporary arrays at the peak, from the compiled programs' own analysis; the
                  dense one need not run
  ratio           dense over chunked
With --time both run in turns, and there are also
  seconds         of the fastest run of each
  time_ratio      chunked over dense
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from opsdc_jax import cli, config, losses
from opsdc_jax.divergences import reverse_kl
from opsdc_jax.models import qwen3

GIB = 2**30
REPEATS = 3


def main(argv: Sequence[str]) -> int:
    """Compiles both ways, and runs them if asked."""
    values = flags.FlagValues()
    define = {"flag_values": values}
    flags.DEFINE_integer("vocabulary", 151_936, "rows of the heads", **define)
    flags.DEFINE_integer("entries", 151_669, "of the tokenizer", **define)
    flags.DEFINE_integer("width", 512, "of hidden states", **define)
    flags.DEFINE_integer("rows", 4, "responses", **define)
    flags.DEFINE_integer("tokens", 8192, "of all responses together", **define)
    chunk = config.default_config().loss.chunk_tokens
    flags.DEFINE_integer("chunk", chunk, "tokens whose logits exist at a time", **define)
    flags.DEFINE_bool("time", False, "also run both", **define)
    args = cli.parse(values, argv)

    def chunked(*arrays: jax.Array) -> jax.Array:
        sums = losses.divergence_sums(reverse_kl, args.entries, args.chunk, None, *arrays)
        return sums.divergence

    def dense(*arrays: jax.Array) -> jax.Array:
        log_q, log_p = (
            jax.nn.log_softmax(qwen3.logits(hidden, head, args.entries))
            for hidden, head in (arrays[0:2], arrays[2:4])
        )
        mask = arrays[-1]
        return jnp.sum(jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1) * mask)

    hidden = (args.rows, args.tokens // args.rows, args.width)
    head = (args.vocabulary, args.width)
    kinds = [(hidden, "float32"), (head, "float32")] * 2
    kinds += [(hidden[:2], kind) for kind in ("int32", "float32", "float32", "bool")]
    shapes = [jax.ShapeDtypeStruct(*kind) for kind in kinds]
    programs = {
        loss.__name__: jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes).compile()
        for loss in (chunked, dense)
    }
    sizes = ("vocabulary", "entries", "width", "rows", "tokens", "chunk")
    result = {"benchmark": "kl"} | {name: getattr(args, name) for name in sizes}
    result |= {
        name: round(program.memory_analysis().temp_size_in_bytes / GIB, 3)
        for name, program in programs.items()
    }
    result["ratio"] = round(result["dense"] / result["chunked"], 2)
    if args.time:
        result["seconds"] = fastest(programs, [random(*kind) for kind in kinds])
        result["time_ratio"] = round(result["seconds"]["chunked"] / result["seconds"]["dense"], 3)
    print(json.dumps(result))
    return cli.EXIT_DONE


def random(shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Hidden states and heads whose logits have a spread of about 1; ones for the rest."""
    if dtype == "float32":
        return jax.random.normal(jax.random.key(len(shape)), shape) * shape[-1] ** -0.25
    return jnp.ones(shape, dtype)


def fastest(programs: Mapping[str, Any], arrays: Sequence[jax.Array]) -> dict[str, float]:
    """Seconds of each program's fastest run; they take turns, after one run each to warm up."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(1 + REPEATS):
        for name, program in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program(*arrays))
            times[name].append(time.perf_counter() - began)
    return {name: round(min(measured[1:]), 3) for name, measured in times.items()}


if __name__ == "__main__":
    sys.exit(cli.run(main))
