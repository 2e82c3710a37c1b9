"""Asks a model in both modes, plain and concise, and counts the tokens.

    python scripts/sample.py --model tiny --prompt "start 33 + 9 - 2 * 3"
    python scripts/sample.py --model Qwen/Qwen3-0.6B --prompt "What is 17 * 23?" --template dapo

Both responses stream side by side as they are sampled: to the plain prompt on the left, under the
conciseness instruction on the right. Where the output is no terminal, they are printed once they
are complete.

Exit codes: 0 done; 1 an unexpected error (with a traceback); 2 bad input.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from absl import flags
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from opsdc_jax import cli, rollout, sharding
from opsdc_jax.config import DTYPES, InputError
from opsdc_jax.models import hf, qwen3, weights
from opsdc_jax.prompts import TEMPLATES, Prompts
from opsdc_jax.sampler import Sampler, decode_mesh
from opsdc_jax.sampling import EVAL_STREAM, SamplingParams, sequence_keys
from opsdc_jax.tiny import BASE_FOLDERS

MAX_PROMPT = 1024  # tokens of a prompt, as a rule: the programs of all such prompts are few
MAX_TOKENS = 4096  # budget of a response where none is given and the model has the positions


def main(argv: Sequence[str]) -> int:
    """Loads the model, shows both responses while they grow, and their lengths."""
    args = parse(argv)
    folder = hf.resolve_folder(args.model)
    config, tokenizer = hf.load_config(folder, args.dtype), hf.load_tokenizer(folder)
    hf.check_vocabulary(tokenizer, config)
    template = args.template or ("tiny" if args.model in BASE_FOLDERS else "plain")
    prompts = Prompts(
        tokenizer,
        template=template,
        instruction=args.instruction,
        student_thinking=not args["no-thinking"].value,
        teacher_thinking=not args["no-thinking"].value,
    )
    stop_ids = hf.stop_token_ids(folder, tokenizer)
    prompts.check_stop_ids(stop_ids)
    refused = prompts.rejection(args.prompt, config.max_position_embeddings - 1)
    if refused:
        raise InputError(f"--prompt cannot be used: {refused}")
    sides = {
        "plain": prompts.student(args.prompt),
        f"concise ({args.instruction})": prompts.teacher(args.prompt),
    }
    longest = max(map(len, sides.values()))
    positions = config.max_position_embeddings
    room = positions - longest
    if args.max_tokens > room:
        raise InputError(f"--max_tokens={args.max_tokens} exceeds the {room} positions left")
    decoding = decode_mesh(config, sharding.make_mesh({"replica": 1, "fsdp": -1, "tensor": 1}), -1)
    sampler = Sampler(
        model=config,
        mesh=decoding,
        prompt_buckets=rollout.length_buckets(max(longest, min(MAX_PROMPT, positions))),
        response_width=args.max_tokens or min(MAX_TOKENS, positions),
        vocab_size=len(tokenizer),
        stop_ids=stop_ids,
        pad_id=tokenizer.pad_token_id,
    )
    cli.use_compilation_cache()
    # Cast and split as decoding wants them.
    shardings = qwen3.shardings(config, decoding, sharding.DECODE_RULES)
    params = weights.load_params(folder, config, shardings=shardings, dtype=args.dtype)
    keys = sequence_keys(args.seed, EVAL_STREAM, 0, np.zeros(len(sides), int))
    rollouts = sampler.stream(
        params,
        list(sides.values()),
        keys,
        SamplingParams(args.temperature, args.top_p, args.top_k, room),
    )
    headings = [f"{name}: prompt of {len(prompt)} tokens" for name, prompt in sides.items()]
    show(Console(), headings, tokenizer, rollouts)
    return cli.EXIT_DONE


def parse(argv: Sequence[str]) -> flags.FlagValues:
    """The command line."""
    values = flags.FlagValues()
    define = {"flag_values": values}
    flags.DEFINE_string("model", None, 'a folder, a hub id, or "tiny"', **define)
    flags.DEFINE_string("prompt", None, "the problem, without any wrapping", **define)
    flags.DEFINE_string(
        "instruction", "v1", "v1, v2, percent20/50/80, none, or a sentence", **define
    )
    flags.DEFINE_enum("template", None, list(TEMPLATES), "wrapping of the problem", **define)
    flags.DEFINE_bool("no-thinking", False, "switch Qwen3's thinking mode off", **define)
    flags.DEFINE_integer(
        "max_tokens",
        0,
        f"budget of a response; 0: {MAX_TOKENS}, if the model has them",
        0,
        **define,
    )
    flags.DEFINE_float("temperature", 0.6, "0 is greedy", 0.0, **define)
    flags.DEFINE_float("top_p", 0.95, "in (0, 1]", 0.0, 1.0, **define)
    flags.DEFINE_integer("top_k", 20, "0 keeps all", 0, **define)
    flags.DEFINE_integer("seed", 0, "of the sampling", 0, 2**31 - 1, **define)
    flags.DEFINE_enum("dtype", "float32", DTYPES, "of weights and activations", **define)
    args = cli.parse(values, argv)
    for name in ("model", "prompt"):
        if not getattr(args, name):
            raise InputError(f"--{name} is required")
    if not 0 < args.top_p <= 1:  # the flag's own bounds let nan pass
        raise InputError(f"--top_p={args.top_p:g} keeps no token: give a number above 0, at most 1")
    if not math.isfinite(args.temperature):
        raise InputError(f"--temperature={args.temperature} must be a finite number")
    return args


def show(
    console: Console, headings: Sequence[str], tokenizer: Any, rollouts: Iterable[rollout.Rollout]
) -> None:
    """Shows the rows of a growing rollout in columns; at the end once more, whole.

    Args:
      headings: one for each row.
    """
    texts: list[str] = []
    captions: list[str] = []
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for grown in rollouts:
            rows = zip(grown.tokens_BxR, grown.lengths_B, strict=True)
            texts = [tokenizer.decode(row[:length]) for row, length in rows]
            captions = [
                f"{length} tokens{'' if stopped else ', cut by the budget'}"
                for length, stopped in zip(grown.lengths_B, grown.stopped_B, strict=True)
            ]
            if console.is_terminal:
                live.update(columns(headings, newest(texts, console)), refresh=True)
    console.print(columns(headings, [Text(text) for text in texts], captions))


def columns(headings: Sequence[str], texts: Sequence[Text], captions: Sequence[str] = ()) -> Table:
    """Texts side by side, each under its heading and above its caption."""
    table = Table(box=box.SIMPLE_HEAD, expand=True, show_footer=bool(captions))
    for index, heading in enumerate(headings):
        table.add_column(
            Text(heading), Text(captions[index] if captions else ""), ratio=1, overflow="fold"
        )
    table.add_row(*texts)
    return table


def newest(texts: Sequence[str], console: Console) -> list[Text]:
    """The last lines of each text, as many as a terminal shows: a live display cannot scroll."""
    width, height = console.width // len(texts) - 4, max(console.height - 5, 1)
    return [Text("\n").join(Text(text).wrap(console, width)[-height:]) for text in texts]


if __name__ == "__main__":
    sys.exit(cli.run(main))
