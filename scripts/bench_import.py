"""Time and memory of reading a checkpoint: python scripts/bench_import.py [--shape qwen3_0p6b]

Writes a randomly initialised bf16 checkpoint of a published shape, reads it to float32 in a fresh
process with a warm page cache, removes it, and prints one JSON object:
  seconds         of the import
  ratio           over the bare read of the file's bytes into memory
  extra_anon      the most anonymous host memory in use beyond the final arrays (GiB); RssAnon
  largest_tensor  size of the largest tensor at the target dtype (GiB)
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from absl import flags

from opsdc_jax import cli
from opsdc_jax.models import hf, qwen3, weights
from opsdc_jax.models.shapes import SHAPES

GIB = 2**30


def main(argv: Sequence[str]) -> int:
    """Makes the checkpoint and measures its import in a fresh process."""
    values = flags.FlagValues()
    define = {"flag_values": values}
    flags.DEFINE_enum("shape", "qwen3_0p6b", list(SHAPES), "architecture", **define)
    flags.DEFINE_string("folder", None, "checkpoint to read; one is made without it", **define)
    args = cli.parse(values, argv)
    if args.folder:
        print(json.dumps({"benchmark": "import", "shape": args.shape} | measure(args.folder)))
        return cli.EXIT_DONE
    with tempfile.TemporaryDirectory() as scratch:
        config = SHAPES[args.shape]
        params = jax.jit(qwen3.init_params, static_argnums=0)(config, jax.random.key(0))
        hf.save_folder(scratch, params, config, eos_token_ids=[0], pad_token_id=0, dtype="bfloat16")
        del params
        again = [sys.executable, __file__, f"--shape={args.shape}", f"--folder={scratch}"]
        subprocess.run(again, check=True)
    return cli.EXIT_DONE


def measure(folder: str) -> dict[str, float]:
    """The figures of one import in this process."""
    bare = min(bare_read(folder) for _ in range(3))
    jnp.zeros(1).block_until_ready()  # the backend starts outside the measurement
    config = hf.load_config(folder)
    baseline, peak = rss_anon(), PeakAnon()
    began = time.perf_counter()
    params = jax.block_until_ready(weights.load_params(folder, config))
    seconds = time.perf_counter() - began
    final = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    extra = peak.stop() - baseline - final
    largest = max(spec.shape[0] * spec.shape[-1] for spec in weights.tensor_table(config).values())
    return {
        "seconds": round(seconds, 2),
        "bare_read_seconds": round(bare, 2),
        "ratio": round(seconds / bare, 2),
        "extra_anon": round(extra / GIB, 3),
        "largest_tensor": round(4 * largest / GIB, 3),
    }


def bare_read(folder: str) -> float:
    """Seconds to read the files of the weights into memory, a file at a time."""
    began = time.perf_counter()
    for path in pathlib.Path(folder).glob("*.safetensors"):
        path.read_bytes()
    return time.perf_counter() - began


def rss_anon() -> int:
    """Anonymous resident memory of this process, in bytes."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{os.uname().sysname} does not report RssAnon")


class PeakAnon:
    """Watches `rss_anon` from a thread, every few milliseconds."""

    def __init__(self) -> None:
        self._peak, self._running = rss_anon(), True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while self._running:
            self._peak = max(self._peak, rss_anon())
            time.sleep(0.005)

    def stop(self) -> int:
        """Ends the watch; the highest value seen."""
        self._running = False
        self._thread.join()
        return max(self._peak, rss_anon())


if __name__ == "__main__":
    sys.exit(cli.run(main))
