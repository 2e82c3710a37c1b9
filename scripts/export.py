"""Writes a run's student as an ordinary Hugging Face folder: weights, configuration, tokenizer.

    python scripts/export.py --checkpoint runs/tiny --out my-model [--dtype bfloat16]

transformers and vLLM load the folder as they load any Qwen3.

Exit codes: 0 done; 1 an unexpected error (with a traceback); 2 bad input.
"""

import contextlib
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence

import jax
from absl import flags

from opsdc_jax import cli
from opsdc_jax.checkpoint import Checkpointer, newest_good
from opsdc_jax.config import DTYPES, InputError
from opsdc_jax.files import writing
from opsdc_jax.models import hf, qwen3
from opsdc_jax.workdir import read_config


def main(argv: Sequence[str]) -> int:
    """Reads the newest checkpoint of a run and writes the folder."""
    values = flags.FlagValues()
    flags.DEFINE_string("checkpoint", None, "folder of the run", flag_values=values)
    flags.DEFINE_string("out", None, "folder to write; must not exist yet", flag_values=values)
    flags.DEFINE_enum(
        "dtype", "bfloat16", DTYPES, "of the weights in the files", flag_values=values
    )
    args = cli.parse(values, argv)
    for name in ("checkpoint", "out"):
        if not getattr(args, name):
            raise InputError(f"--{name} DIR is required")
    run, out = pathlib.Path(args.checkpoint), pathlib.Path(args.out)
    if out.exists():
        raise InputError(f"--out={out} exists already: choose another folder or remove it")

    settings = read_config(run)
    if not (run / "checkpoints").is_dir():
        raise InputError(f"{run} holds no checkpoints: give the workdir of a run")
    base = hf.resolve_folder(settings.model.path)
    model, tokenizer = hf.load_config(base), hf.load_tokenizer(base)
    # On the host: a model that trained on many devices need not fit into one of them.
    device = jax.sharding.SingleDeviceSharding(cpu())
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        qwen3.abstract_params(model),
    )
    step, wrong = newest_good(run / "checkpoints")
    for later, reason in wrong.items():
        print(f"the checkpoint of step {later} is damaged ({reason})")
    if not step:
        raise InputError(f"{run} holds no finished checkpoint that is whole")
    with Checkpointer(run / "checkpoints", settings.checkpoint.keep) as checkpoints:
        student = checkpoints.restore_student(step, like)
    with whole_or_not_at_all(out) as folder:
        hf.save_folder(
            folder,
            student,
            model,
            eos_token_ids=list(hf.stop_token_ids(base, tokenizer)),
            pad_token_id=tokenizer.pad_token_id,
            dtype=args.dtype,
            # The student is sampled as its base is: another temperature would be another
            # comparison.
            generation=hf.generation_settings(base),
        )
        tokenizer.save_pretrained(folder)
    print(f"wrote the student of step {step} to {out} ({args.dtype})")
    return cli.EXIT_DONE


def cpu() -> jax.Device:
    """The host, as a device.

    Raises:
      InputError: JAX_PLATFORMS leaves it out.
    """
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:
        raise InputError(
            "JAX has no CPU here, where the weights are read to: add cpu to JAX_PLATFORMS, as in "
            "JAX_PLATFORMS=cuda,cpu"
        ) from None


@contextlib.contextmanager
def whole_or_not_at_all(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to fill, which becomes `out` in the end: what is called `out` is a whole model.

    Raises:
      InputError: the place cannot be written.
    """
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
            folder = pathlib.Path(scratch) / "model"
            folder.mkdir()
            try:
                yield folder
            except Exception as error:
                # safetensors and tokenizers wrap the system's errors into ones of their own.
                found = re.search(r"\(os error (\d+)\)", str(error))
                if not found:
                    raise
                raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
            folder.replace(out)


if __name__ == "__main__":
    sys.exit(cli.run(main))
