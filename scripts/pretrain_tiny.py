"""Pretrains a tiny base model anew: python scripts/pretrain_tiny.py --out DIR [--seed 0]

`--world hard` takes the corpus of the world described in docs/tiny_hard.md.

Writes a Hugging Face folder (weights, tokenizer) and recipe.json beside them: the command, the
recipe, the time it took and what was measured. The folders that ship with the package are
opsdc_jax/tiny/base and base_hard; `--config.model.path=DIR` trains on yours.

Exit codes: 0 done; 1 an unexpected error (with a traceback); 2 bad input.
"""

import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from opsdc_jax import cli, data, evaluate, grading, sharding
from opsdc_jax.config import InputError
from opsdc_jax.models.layers import Qwen3Config
from opsdc_jax.models.qwen3 import Params
from opsdc_jax.progress import seconds
from opsdc_jax.prompts import Prompts
from opsdc_jax.sampler import Sampler, decode_mesh
from opsdc_jax.sampling import SamplingParams
from opsdc_jax.statistics import HEADLINE
from opsdc_jax.tiny import pretrain, task, tokenizer
from opsdc_jax.tiny.worlds import WORLDS, World

PROMPT_WIDTH = 40  # tokens, in the measurement
BUDGET_MARGIN = 8  # tokens of a response beyond the world's longest
SLOTS = 64  # rows that decode at a time
REPORT_EVERY = 20  # steps


def main(argv: Sequence[str]) -> int:
    """Trains, writes, measures."""
    values = flags.FlagValues()
    flags.DEFINE_string("out", None, "folder to write; must not exist yet", flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the weights and the corpus", 0, flag_values=values)
    flags.DEFINE_enum("world", "default", list(WORLDS), "of the corpus", flag_values=values)
    flags.DEFINE_float("steps_scale", 1.0, "times the recipe's steps", 0.0, flag_values=values)
    flags.DEFINE_integer(
        "samples_per_level", 512, "measured per prompt; 0 = none", 0, flag_values=values
    )
    args = cli.parse(values, argv)
    if not args.out:
        raise InputError("--out DIR is required")
    out = pathlib.Path(args.out)
    if out.exists():
        raise InputError(f"--out={out} exists already: choose another folder or remove it")

    recipe = pretrain.Recipe().scaled(args.steps_scale)
    words = tokenizer.build_tokenizer()
    progress = Progress(recipe.steps)
    world = WORLDS[args.world]
    params, config = pretrain.pretrain(
        words, seed=args.seed, recipe=recipe, world=world, report=progress
    )
    record = {
        "command": f"python scripts/pretrain_tiny.py --out=DIR --seed={args.seed} "
        f"--world={args.world} --steps_scale={args.steps_scale:g}",
        "recipe": dataclasses.asdict(recipe),
        "mix": {name or "plain": share for name, share in world.mix.items()},
        "machine": f"{os.cpu_count()} CPU cores, jax {jax.__version__}",
        "minutes": round(progress.elapsed() / 60, 1),
        "loss": progress.losses,
    }
    pretrain.save(out, params, config, words)
    if args.samples_per_level:
        record["sampling"] = {"temperature": 1.0, "samples_per_level": args.samples_per_level}
        record["measured"] = measure(params, config, words, world, args.samples_per_level)
    (out / "recipe.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {out}")
    return cli.EXIT_DONE


class Progress:
    """Prints a line every few steps, with the time left; keeps the losses printed."""

    def __init__(self, steps: int):
        self._steps = steps
        self._began = time.perf_counter()
        self.losses: dict[int, float] = {}

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._began

    def __call__(self, step: int, loss: jax.Array) -> None:
        """Reads `loss` only at the steps that print: the others need not wait for it."""
        if step % REPORT_EVERY and step != self._steps:
            return
        self.losses[step] = round(float(loss), 4)
        left = self.elapsed() / step * (self._steps - step)
        print(
            f"step {step:>4}/{self._steps}  loss {self.losses[step]:.4f}  {seconds(left)} left",
            flush=True,
        )


def measure(
    params: Params, config: Qwen3Config, words: Any, world: World, samples_per_level: int
) -> dict[str, Any]:
    """Accuracy and tokens on held-out problems at temperature 1, by prompt and level."""
    mesh = sharding.make_mesh({"replica": 1, "fsdp": -1, "tensor": 1})
    sampler = Sampler(
        model=config,
        mesh=decode_mesh(config, mesh, -1),
        prompt_buckets=(PROMPT_WIDTH,),
        response_width=world.max_response_tokens + BUDGET_MARGIN,
        vocab_size=len(words),
        stop_ids=(words.eos_token_id,),
        pad_id=words.pad_token_id,
        slots=SLOTS,
    )
    examples = data.tiny_evaluation(0, samples_per_level)
    measured = {}
    for name in world.mix:
        prompts = Prompts(words, template="tiny", instruction=name or "v1")
        render = prompts.teacher if name else prompts.student
        batches = evaluate.responses(
            params,
            sampler,
            words,
            examples,
            [render(example.problem) for example in examples],
            sampling=SamplingParams(),
            seed=0,
            samples=1,
        )
        rows = [row for batch in batches for row in batch]
        measured[name or "plain"] = {
            level: figures([row for row in rows if level in ("all", row["level"])])
            for level in ("all", *task.LEVELS)
        }
        row = "  ".join(
            f"{group} {100 * values['accuracy']:.1f}% / {values['tokens']:.1f}"
            for group, values in measured[name or "plain"].items()
        )
        print(f"{name or 'plain':<10} {row}", flush=True)
    return measured


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Accuracy, mean tokens and truncated fraction of responses (docs/formats.md)."""
    correct = [
        grading.grade(row["text"], row["gold"], truncated=not row["stopped"])[HEADLINE]
        for row in rows
    ]
    return {
        "accuracy": round(float(np.mean(correct)), 4),
        "tokens": round(float(np.mean([len(row["ids"]) for row in rows])), 1),
        "truncated": round(float(np.mean([not row["stopped"] for row in rows])), 4),
    }


if __name__ == "__main__":
    sys.exit(cli.run(main))
