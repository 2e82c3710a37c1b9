"""Rehearses a Qwen3 run on this machine: the real shape, tokenizer and prompts, random weights.

    python scripts/rehearse.py --tokenizer DIR|ID --data FILE [--run_config FILE]

Makes a randomly initialised checkpoint of a published shape (default: the full Qwen3-0.6B), trains
two steps on the given problems through scripts/train.py in a process of its own, exports the
student, reads the folder back (with transformers where torch is installed), prints one JSON object
with seconds and peak RSS, and removes what it made.

Exit codes: 0 done; 1 an unexpected error (with a traceback); 2 bad input.
"""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from opsdc_jax import cli
from opsdc_jax.config import InputError
from opsdc_jax.models import hf, qwen3, weights
from opsdc_jax.models.layers import Qwen3Config
from opsdc_jax.models.shapes import SHAPES

SCRIPTS = pathlib.Path(__file__).parent
CONFIGS = SCRIPTS.parent / "configs"


def main(argv: Sequence[str]) -> int:
    """Makes the checkpoint, trains, exports, reports, removes."""
    values = flags.FlagValues()
    define = {"flag_values": values}
    flags.DEFINE_string("tokenizer", None, "folder or hub id of a Qwen3 tokenizer", **define)
    flags.DEFINE_string("data", None, "problems, as in data.source", **define)
    flags.DEFINE_string(
        "run_config", str(CONFIGS / "qwen3_0p6b.py"), "configuration file", **define
    )
    flags.DEFINE_enum("shape", "qwen3_0p6b", list(SHAPES), "architecture", **define)
    flags.DEFINE_integer("layers", 0, "layers instead of the shape's; 0 keeps them", 0, **define)
    flags.DEFINE_integer("batch_size", 4, "prompts a step", 1, **define)
    flags.DEFINE_integer("prompt_tokens", 512, "longest prompt", 1, **define)
    flags.DEFINE_integer("response_tokens", 64, "longest rollout", 1, **define)
    flags.DEFINE_string("scratch", None, "where to work; the system's folder", **define)
    args = cli.parse(values, argv)
    for name in ("tokenizer", "data"):
        if not getattr(args, name):
            raise InputError(f"--{name} is required")

    tokenizer = hf.load_tokenizer(hf.resolve_folder(args.tokenizer))
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder = pathlib.Path(scratch)
        began = time.perf_counter()
        make_base(folder / "base", args.shape, args.layers, tokenizer)
        print(f"made the checkpoint in {time.perf_counter() - began:.0f} s", file=sys.stderr)
        train_seconds, train_rss = timed(
            "train.py",
            f"--config={args.run_config}",
            f"--workdir={folder / 'run'}",
            f"--config.model.path={folder / 'base'}",
            f"--config.data.source={args.data}",
            "--config.eval.source=none",
            "--config.train.steps=2",
            f"--config.train.batch_size={args.batch_size}",
            f"--config.train.micro_batch_size={args.batch_size}",
            f"--config.sampler.max_prompt_tokens={args.prompt_tokens}",
            f"--config.sampler.max_response_tokens={args.response_tokens}",
            "--config.checkpoint.every_steps=0",
        )
        export_seconds, export_rss = timed(
            "export.py", f"--checkpoint={folder / 'run'}", f"--out={folder / 'student'}"
        )
        config = hf.load_config(folder / "student")
        reader = read_back(folder / "student", config)
        print(
            json.dumps(
                {
                    "benchmark": "rehearse",
                    "shape": args.shape,
                    "layers": config.num_hidden_layers,
                    "read_back_by": reader,
                    "train_seconds": round(train_seconds, 1),
                    "train_peak_rss_gib": round(train_rss, 2),
                    "export_seconds": round(export_seconds, 1),
                    "export_peak_rss_gib": round(export_rss, 2),
                }
            )
        )
    return cli.EXIT_DONE


def make_base(folder: pathlib.Path, shape: str, layers: int, tokenizer: Any) -> None:
    """Writes a bf16 checkpoint with random weights and the given tokenizer."""
    config = SHAPES[shape]
    if layers:
        config = dataclasses.replace(config, num_hidden_layers=layers)
    params = jax.jit(qwen3.init_params, static_argnums=0)(config, jax.random.key(0))
    hf.save_folder(
        folder,
        params,
        config,
        eos_token_ids=[tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )
    tokenizer.save_pretrained(folder)


def read_back(folder: pathlib.Path, config: Qwen3Config) -> str:
    """Reads the exported folder with transformers where torch is installed, else with our reader.

    Returns:
      the name of the reader.
    """
    if importlib.util.find_spec("torch") is None:
        weights.load_params(folder, config, dtype="bfloat16")
        return "opsdc_jax"
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    if model.num_parameters() != sum(
        math.prod(leaf.shape) for leaf in jax.tree.leaves(qwen3.abstract_params(config))
    ):
        raise RuntimeError("transformers found another number of parameters in the export")
    return "transformers"


def timed(script: str, *arguments: str) -> tuple[float, float]:
    """Runs a script in a fresh process; wall-clock seconds and peak RSS in GiB."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(SCRIPTS / script), *arguments], stdout=sys.stderr
    )
    _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == cli.EXIT_BAD_INPUT:
        raise InputError(f"{script} refused its input, see above")
    if code:
        raise RuntimeError(f"{script} failed with exit code {code}")
    return time.perf_counter() - began, usage.ru_maxrss / 2**20


if __name__ == "__main__":
    sys.exit(cli.run(main))
