"""Guards on the demo: healthy seeds pass, and what collapses is stopped.

    python scripts/bench_guards.py [--seeds 0,1,2,3,4,5,6,7,8,9] [--wrong_seeds 0,1,2] [--out DIR]

Prints one JSON object a line. `exit_code` is that of scripts/train.py: 0 done, 2 refused, 4 stopped
by a guard; `fires` and `step` are the guards that fire first, and where.

- healthy: configs/tiny.py, once a seed. `closest`: how near each value came to its limits, as
  multiples of them: below 1 for `rise`, above 1 for `fall`, or the guard would have fired.
- optim.lr=1e-2: a hundred times the demo's, once a seed of `--wrong_seeds`.
- teacher.every=1, the same seeds: evaluated every 2 steps and let go on, so that `accuracy`, by
  step, shows what would have come.
- wrong end: a base whose files name another end-of-sequence token than its chat template writes.
- noise: no run, but what batches show by chance alone. `false_alarms` is the share
  of 200 simulated runs of 100 steps, in which nothing changes, where a guard still fires.
"""

import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from opsdc_jax import cli, config, guards
from opsdc_jax.benchmarks import TINY
from opsdc_jax.config import InputError
from opsdc_jax.files import read_json, write_json
from opsdc_jax.guards import Row
from opsdc_jax.metrics import read_metrics
from opsdc_jax.statistics import HEADLINE
from opsdc_jax.tiny import BASE_FOLDER

ROOT = pathlib.Path(__file__).parent.parent
NO_EVALUATION = "--config.eval.source=none"


def main(argv: Sequence[str]) -> int:
    """Runs every case, each in a fresh process."""
    values = flags.FlagValues()
    seeds = [str(seed) for seed in range(10)]
    flags.DEFINE_list("seeds", seeds, "seeds of the healthy runs", flag_values=values)
    wrong = ["0", "1", "2"]
    flags.DEFINE_list("wrong_seeds", wrong, "seeds of those that collapse", flag_values=values)
    flags.DEFINE_string("out", "runs/bench_guards", "folder of the runs; must be new", values)
    args = cli.parse(values, argv)
    out, limits = pathlib.Path(args.out), config.default_config().guards
    if out.exists():
        raise InputError(f"--out={out} exists already: choose another folder or remove it")
    for seed in args.seeds:
        found = run(out / f"seed-{seed}", NO_EVALUATION, f"--config.seed={seed}")
        rows = read_metrics(out / f"seed-{seed}" / "metrics.jsonl")
        case = {"case": "healthy", "seed": int(seed)}
        print(json.dumps(case | found | {"closest": closest(rows, limits)}), flush=True)

    for seed in args.wrong_seeds:
        case = {"case": "optim.lr=1e-2", "seed": int(seed)}
        options = [NO_EVALUATION, "--config.optim.lr=1e-2", f"--config.seed={seed}"]
        print(json.dumps(case | run(out / f"lr-{seed}", *options)), flush=True)
    for seed in args.wrong_seeds:
        case = {"case": "teacher.every=1", "seed": int(seed)}
        print(json.dumps(case | every_step(out / f"every-1-{seed}", seed)), flush=True)

    base = wrong_end(out / "base")
    found = run(out / "wrong-end", NO_EVALUATION, f"--config.model.path={base}")
    print(json.dumps({"case": "wrong end"} | found), flush=True)

    for batch_size, window in ((32, 3), (16, 3), (8, 3), (8, 9)):
        limits.window = window
        case = {"case": "noise", "batch_size": batch_size, "window": window}
        print(json.dumps(case | {"false_alarms": false_alarms(batch_size, limits)}), flush=True)
    return cli.EXIT_DONE


def run(workdir: pathlib.Path, *options: str) -> dict[str, Any]:
    """One run of the demo; its output goes to standard error."""
    command = [sys.executable, str(ROOT / "scripts" / "train.py")]
    command += ["--config", str(ROOT / "configs" / "tiny.py"), "--config.log.token_views=0"]
    command += ["--workdir", str(workdir), *options]
    code = subprocess.run(command, stdout=sys.stderr, check=False).returncode
    rows = read_metrics(workdir / "metrics.jsonl")
    return {"exit_code": code} | first_alarm(rows, config.default_config().guards)


def every_step(folder: pathlib.Path, seed: str) -> dict[str, Any]:
    """A run whose teacher is refreshed after every step, let go on, with its accuracy by step."""
    evaluation = ["--config.eval.every=2", "--config.eval.samples_per_level=256"]
    options = ["--config.teacher.every=1", "--config.guards.action=warn", f"--config.seed={seed}"]
    found = run(folder, *options, *evaluation)
    curve = read_json(folder / "eval" / "summary.json")["benchmarks"][TINY]["curve"]
    accuracy = {
        point["step"]: round(point["statistics"]["scores"][HEADLINE]["value"], 3) for point in curve
    }
    return found | {"accuracy": accuracy}


def first_alarm(rows: Sequence[Row], limits: ConfigDict) -> dict[str, Any]:
    """The guards that fire first, and at which step; None if none does."""
    for count in range(1, len(rows) + 1):
        found = guards.alarms(rows[:count], limits)
        if found:
            return {"fires": sorted(found), "step": rows[count - 1]["step"]}
    return {"fires": [], "step": None}


def closest(rows: Sequence[Row], limits: ConfigDict) -> dict[str, dict[str, float]]:
    """How near each value came to its limits over a run, as multiples of them."""
    found = {}
    for key in guards.WATCHED:
        values = [value for _, value in guards.course(key, rows)]
        bands = [
            guards.bands(key, values[:count], limits)
            for count in range(limits.window + 1, len(values) + 1)
        ]
        found[key] = {"rise": round(max(band.now / band.high for band in bands), 3)}
        if bands[0].low > 0:
            found[key]["fall"] = round(min(band.now / band.low for band in bands), 3)
    return found


def false_alarms(batch_size: int, limits: ConfigDict) -> dict[str, float]:
    """The share of runs without any change in which a guard fires, by what it watches.

    A rollout's length has a standard deviation of 0.6 of its mean, its entropy of 0.3; 30% of the
    rollouts are truncated.
    """
    runs, steps = 200, 100
    shape = runs, steps, batch_size
    random = np.random.default_rng(0)
    drawn = {
        "response_tokens": random.gamma(1 / 0.6**2, size=shape).mean(-1),
        "truncated": random.binomial(batch_size, 0.3, shape[:2]) / batch_size,
        "student_entropy": random.gamma(1 / 0.3**2, size=shape).mean(-1),
    }

    def fires(key: str, values: Sequence[float]) -> bool:
        bands = (
            guards.bands(key, values[:count], limits) for count in range(limits.window + 1, steps)
        )
        return any(not band.low <= band.now <= band.high for band in bands)

    return {
        key: sum(fires(key, values) for values in series) / runs for key, series in drawn.items()
    }


def wrong_end(folder: pathlib.Path) -> pathlib.Path:
    """A copy of the embedded base whose files name the padding token as the end."""
    shutil.copytree(BASE_FOLDER, folder)
    for name, change in (
        ("tokenizer_config.json", {"eos_token": "<|endoftext|>"}),
        ("generation_config.json", {"eos_token_id": 0}),
        ("config.json", {"eos_token_id": 0}),
    ):
        write_json(folder / name, read_json(folder / name) | change)
    return folder


if __name__ == "__main__":
    sys.exit(cli.run(main))
