"""Asks a model in both modes, plain and concise, and counts the tokens.

    python scripts/sample.py --model tiny --prompt "start 33 + 9 - 2 * 3"
    python scripts/sample.py --model Qwen/Qwen3-0.6B --prompt "What is 17 * 23?" --template dapo

The text streams as it is sampled: first the response to the plain prompt, then the response under
the conciseness instruction.

Exit codes: 0 done; 1 an unexpected error (with a traceback); 2 bad input.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from opsdc_jax import cli, sharding
from opsdc_jax.config import DTYPES, InputError
from opsdc_jax.models import hf, qwen3, weights
from opsdc_jax.models.qwen3 import Params
from opsdc_jax.prompts import TEMPLATES, Prompts
from opsdc_jax.sampler import EVAL_STREAM, Sampler, SamplingParams, sequence_keys

SEGMENT = 16  # tokens between two looks at the response


def main(argv: Sequence[str]) -> int:
    """Loads the model, streams both responses, prints the counts."""
    args = parse(argv)
    folder = hf.resolve_folder(args.model)
    config, tokenizer = hf.load_config(folder, args.dtype), hf.load_tokenizer(folder)
    hf.check_vocabulary(tokenizer, config)
    template = args.template or ("tiny" if args.model == "tiny" else "plain")
    prompts = Prompts(
        tokenizer,
        template=template,
        instruction=args.instruction,
        student_thinking=not args["no-thinking"].value,
        teacher_thinking=not args["no-thinking"].value,
    )
    sides = {
        "plain": prompts.student(args.prompt),
        f"concise ({args.instruction})": prompts.teacher(args.prompt),
    }
    mesh = sharding.make_mesh({"replica": 1, "fsdp": 1, "tensor": -1})
    sampler = Sampler(
        model=config,
        prompt_buckets=(max(map(len, sides.values())),),
        response_width=args.max_tokens,
        vocab_size=len(tokenizer),
        stop_ids=hf.stop_token_ids(folder, tokenizer),
        pad_id=tokenizer.pad_token_id,
        rows=sharding.batch_sharding(mesh),
    )
    cli.use_compilation_cache()
    params = weights.load_params(
        folder, config, shardings=qwen3.shardings(config, mesh), dtype=args.dtype
    )
    sampling = SamplingParams(args.temperature, args.top_p, args.top_k)
    counts = {}
    for name, prompt in sides.items():
        print(f"--- {name}: prompt of {len(prompt)} tokens")
        counts[name] = print_stream(sampler, params, tokenizer, prompt, sampling, args.seed)
    for name, (tokens, stopped) in counts.items():
        print(f"{name:>16}: {tokens} tokens{'' if stopped else ', cut by the budget'}")
    return cli.EXIT_DONE


def parse(argv: Sequence[str]) -> flags.FlagValues:
    """The command line."""
    values = flags.FlagValues()
    define = {"flag_values": values}
    flags.DEFINE_string("model", None, 'a folder, a hub id, or "tiny"', **define)
    flags.DEFINE_string("prompt", None, "the problem, without any wrapping", **define)
    flags.DEFINE_string("instruction", "v1", "v1, v2, percent20/50/80, or a sentence", **define)
    flags.DEFINE_enum("template", None, list(TEMPLATES), "wrapping of the problem", **define)
    flags.DEFINE_bool("no-thinking", False, "switch Qwen3's thinking mode off", **define)
    flags.DEFINE_integer("max_tokens", 160, "budget of a response", 1, **define)
    flags.DEFINE_float("temperature", 0.6, "0 is greedy", 0.0, **define)
    flags.DEFINE_float("top_p", 0.95, "in (0, 1]", 0.0, 1.0, **define)
    flags.DEFINE_integer("top_k", 20, "0 keeps all", 0, **define)
    flags.DEFINE_integer("seed", 0, "of the sampling", 0, **define)
    flags.DEFINE_enum("dtype", "float32", DTYPES, "of weights and activations", **define)
    args = cli.parse(values, argv)
    for name in ("model", "prompt"):
        if not getattr(args, name):
            raise InputError(f"--{name} is required")
    return args


def print_stream(
    sampler: Sampler,
    params: Params,
    tokenizer: Any,
    prompt: list[int],
    sampling: SamplingParams,
    seed: int,
) -> tuple[int, bool]:
    """Prints a response while it grows; returns its tokens and whether it stopped by itself."""
    keys = sequence_keys(seed, EVAL_STREAM, 0, np.arange(1))
    printed, rollout = "", None
    for rollout in sampler.stream(params, [prompt], keys, sampling, SEGMENT):
        text = tokenizer.decode(rollout.tokens_BxR[0, : rollout.lengths_B[0]])
        # A character may end in the next segment: until then it decodes to a replacement mark.
        ready = text.rstrip("\N{REPLACEMENT CHARACTER}")
        if ready.startswith(printed):
            print(ready[len(printed) :], end="", flush=True)
            printed = ready
    print()
    assert rollout is not None
    return int(rollout.lengths_B[0]), bool(rollout.stopped_B[0])


if __name__ == "__main__":
    sys.exit(cli.run(main))
