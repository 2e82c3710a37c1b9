"""The demo over several seeds, each in a fresh process.

    python scripts/bench_demo.py [--seeds 0,1,2]

Prints one JSON object a line for each seed: wall-clock seconds of the whole process (compilations
included: their cache starts empty), its peak RSS, `ratio` = the student's mean response tokens over
the base model's at plain prompts, accuracies, and whether each claim of the paper held
(opsdc_jax/report.py): compression, accuracy_held, easy_first.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from opsdc_jax import cli, report
from opsdc_jax.benchmarks import TINY
from opsdc_jax.files import read_json
from opsdc_jax.statistics import HEADLINE

ROOT = pathlib.Path(__file__).parent.parent


def main(argv: Sequence[str]) -> int:
    """Runs the demo once a seed."""
    values = flags.FlagValues()
    flags.DEFINE_list("seeds", ["0", "1", "2"], "seeds of the runs", flag_values=values)
    flags.DEFINE_string("out", "runs/bench_demo", "folder of the runs; emptied", flag_values=values)
    args = cli.parse(values, argv)
    for seed in args.seeds:
        workdir = pathlib.Path(args.out) / f"seed-{seed}"
        shutil.rmtree(workdir, ignore_errors=True)
        measured = run(seed, workdir)
        summary = read_json(workdir / "eval" / "summary.json")
        print(json.dumps({"benchmark": "demo", "seed": int(seed)} | measured | figures(summary)))
    return cli.EXIT_DONE


def run(seed: str, workdir: pathlib.Path) -> dict[str, float]:
    """One demo with an empty compilation cache; its output goes to standard error."""
    command = [sys.executable, str(ROOT / "scripts" / "train.py")]
    command += ["--config", str(ROOT / "configs" / "tiny.py"), f"--config.seed={seed}"]
    command += ["--workdir", str(workdir)]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=sys.stderr, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
    code = os.waitstatus_to_exitcode(status)
    if code:
        raise RuntimeError(f"the demo with seed {seed} failed with exit code {code}")
    return {"seconds": round(seconds, 1), "peak_rss_gib": round(usage.ru_maxrss / 2**20, 2)}


def figures(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a run's summary.json, and whether the paper's claims hold on it."""
    benchmark = summary["benchmarks"][TINY]
    overall = {name: system["overall"] for name, system in benchmark["systems"].items()}
    student = next(
        comparison
        for comparison in benchmark["comparisons"]
        if (comparison["system"], comparison["against"]) == ("student", "base")
    )

    def ratio(comparison: Mapping[str, Any]) -> float:
        return round(1 - comparison["token_reduction"]["overall"]["value"], 4)

    return {
        "ratio": ratio(student["overall"]),
        "ratio_by_level": {level: ratio(group) for level, group in student["by_level"].items()},
        "accuracy": {
            name: round(statistics["scores"][HEADLINE]["value"], 4)
            for name, statistics in overall.items()
        },
        "tokens": {
            name: round(statistics["tokens"]["mean"]["value"], 1)
            for name, statistics in overall.items()
        },
        "problems": overall["base"]["problems"],
    } | {claim.name: claim.held for claim in report.claims(benchmark)}


if __name__ == "__main__":
    sys.exit(cli.run(main))
