"""Variants of a configuration over several seeds, and whether the paper's claims hold on them.

    python scripts/ablate.py --suite divergence,teacher,instruction [--seeds 3] [--jobs 1]
    python scripts/ablate.py --suite method --config configs/qwen3_8b.py --out runs/ablate_8b

Suites: method, divergence, teacher, instruction, rollout, temperature, lr, normalisation, options,
baselines (opsdc_jax/ablation/suites.py). Each variant is trained and evaluated by scripts/train.py
once a seed, from config.seed on, each run in a fresh process: OUT/runs/NAME-seedS, its output in
the log beside it. Keys are overridden as there (--config.train.steps=20), for all variants; but
guards only warn, nothing is evaluated on the way, and there are no token views.

A finished run is used again, an interrupted one continued by the same command; a folder that holds
a run of another configuration is refused. A variant that stands in several suites is run once, and
a run takes the base model's responses over from one of its seed that has them. --jobs runs so many
at a time, each on an equal share of the processors: another number of threads rounds otherwise, so
its results differ in their last bits, and after many steps in what is sampled, as another seed's
would, but not on average. On an accelerator leave it at 1. Every run keeps its newest two
checkpoints (--config.checkpoint.keep=1: one).

Each suite writes OUT/SUITE/: results.json (all measures), table.md and plot.svg, and prints its
table and a verdict for each claim of the paper, by rules that were written before any run
(opsdc_jax/ablation/rules.py). --doc FILE also puts rules and tables into a document, between
comments that bear the suites' names.

Exit codes: 0 done; 1 a run failed (the others were made); 2 bad input; 3 stopped by Ctrl-C or
SIGTERM, the same command continues.
"""

import importlib.util
import pathlib
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from opsdc_jax import cli, config
from opsdc_jax.ablation import measures, runs, suites, text
from opsdc_jax.ablation.rules import Runs
from opsdc_jax.ablation.runs import Run
from opsdc_jax.ablation.suites import Suite
from opsdc_jax.config import InputError
from opsdc_jax.files import write_json, writing
from opsdc_jax.workdir import Workdir

ROOT = pathlib.Path(__file__).parent.parent
TINY = str(ROOT / "configs" / "tiny.py")
FIXED = {"guards.action": "warn", "eval.every": 0, "log.token_views": 0}


def main(argv: Sequence[str]) -> int:
    """Makes the runs, then judges suite by suite."""
    args, file, base = parse(argv)
    chosen = suites.chosen(args.suite, base)
    out = pathlib.Path(args.out)
    variants = [variant.overrides for suite in chosen.values() for variant in suite.variants]
    wanted = runs.planned(base, variants, args.seeds, out / "runs")
    if args.doc:
        filled(args.doc, dict.fromkeys(chosen, ""))  # or it fails before the runs
        put(args.doc, {"rules": text.rules()})
    missing = sum(not run.finished for run in wanted)
    print(f"{len(wanted)} runs, of which {missing} are to be made", flush=True)
    with writing(out):
        (out / "runs").mkdir(parents=True, exist_ok=True)
    train = [sys.executable, str(ROOT / "scripts" / "train.py")]
    path = cli.config_path(argv)
    train += ["--config", path or TINY]
    failed: list[str] = []
    record = out / "runs.jsonl"
    on_sigterm = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        done = runs.run_all(wanted, train, file, args.jobs, record)
        for number, (run, code, seconds) in enumerate(done, start=1):
            print(f"[{number}/{missing}] {run.folder.name}: {seconds:.0f} s", flush=True)
            if code:
                failed.append(f"{run.folder.name} ended with exit code {code}: see {run.log}")
                print(failed[-1], file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("stopped: the same command continues", file=sys.stderr)
        return cli.EXIT_STOPPED
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)

    measured = measure(wanted, record)
    ours = [*(["--config", path] if path else []), *runs.overrides(file, args.config)]
    command = shlex.join(["python", "scripts/ablate.py", *ours])
    for name, suite in chosen.items():
        show(name, suite, base, measured, args, command)
    for sentence in failed:
        print(sentence, file=sys.stderr)
    return cli.EXIT_FAILED if failed else cli.EXIT_DONE


def parse(argv: Sequence[str]) -> tuple[flags.FlagValues, ConfigDict, ConfigDict]:
    """The flags, what the configuration file says, and the configuration of the default run.

    Raises:
      InputError: a flag, or the configuration, is wrong.
    """
    path = cli.config_path(argv)
    argv = [*argv] if path else [argv[0], "--config", TINY, *argv[1:]]
    values = cli.config_flag_values(argv)
    define: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_string("suite", None, "which, separated by commas", **define)
    flags.DEFINE_integer("seeds", 3, "runs of each variant", 1, **define)
    flags.DEFINE_integer("jobs", 1, "runs at a time", 1, **define)
    flags.DEFINE_string("out", "runs/ablate", "folder of runs and results", **define)
    flags.DEFINE_string("doc", None, "a document that rules and tables are put into", **define)
    args = cli.parse(values, argv)
    if not args.suite:
        raise InputError("--suite is required, for instance --suite divergence")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("the plots need matplotlib: pip install 'opsdc-jax[bench]'")
    plain = [argv[0], "--config", path or TINY]
    file = cli.parse(cli.config_flag_values(plain), plain).config
    base = suites.applied(args.config, FIXED)
    config.validate(base)
    if "," in base.eval.source or base.eval.source == "none":
        raise InputError(
            f"eval.source={base.eval.source!r} must be one benchmark, which the variants are "
            "compared on"
        )
    return args, file, base


def measure(wanted: Sequence[Run], record: pathlib.Path) -> dict[str, dict[int, measures.Measures]]:
    """Measures of the finished runs: name of a variant's runs -> seed -> measures."""
    seconds = runs.recorded_seconds(record)
    found: dict[str, dict[int, measures.Measures]] = {}
    for run in wanted:
        of_seeds = found.setdefault(run.name, {})
        if run.finished:
            of_seeds[run.seed] = measures.of_run(Workdir(run.folder, run.settings))
            if run.folder.name in seconds:
                of_seeds[run.seed]["seconds"] = seconds[run.folder.name]
    return found


def show(
    name: str, suite: Suite, base: ConfigDict, measured: Runs, args: flags.FlagValues, command: str
) -> None:
    """Writes a suite's results.json, table.md and plot.svg, and prints table and verdicts."""
    names = {v.name: suites.run_name(base, v.overrides) for v in suite.variants}
    of_suite = {variant: measured[run_name] for variant, run_name in names.items()}
    judged = text.judged(name, of_suite, args.seeds)
    verdicts = "\n".join(text.sentence(*found) for found in judged)
    minutes = sum(run.get("seconds", 0.0) for of in of_suite.values() for run in of.values()) / 60
    shown = "\n\n".join(
        [
            f"{suite.question} `{command} --suite {name} --seeds {args.seeds}`, "
            f"{minutes:.0f} minutes of runs:",
            text.table(suite, of_suite, names),
            verdicts or "No claim of the paper hangs on this suite.",
        ]
    )
    print(f"\n{name}: {shown}", flush=True)
    folder = pathlib.Path(args.out) / name
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.md").write_text(f"{shown}\n", encoding="utf-8")
        plot(suite, of_suite, folder / "plot.svg")
    write_json(folder / "results.json", as_json(suite, names, of_suite, judged))
    if args.doc:
        put(args.doc, {name: shown})


def as_json(
    suite: Suite, names: Mapping[str, str], found: Runs, judged: Sequence[text.JudgedClaim]
) -> dict[str, Any]:
    """The contents of results.json."""
    return {
        "question": suite.question,
        "variants": {
            variant: {
                "runs": names[variant],
                "seeds": {str(seed): of_run for seed, of_run in of_seeds.items()},
                "over_seeds": measures.over_seeds(list(of_seeds.values())),
            }
            for variant, of_seeds in found.items()
        },
        "claims": [
            {
                "claim": claim.text,
                "source": claim.source,
                "verdict": verdict,
                "quantities": [
                    {
                        "quantity": text.named(part.quantity),
                        "estimate": part.estimate,
                        "verdict": part.verdict,
                        "reason": part.reason,
                    }
                    for part in parts
                ],
            }
            for claim, verdict, parts in judged
        ],
    }


def plot(suite: Suite, found: Runs, path: pathlib.Path) -> None:
    """Token reduction and accuracy of the variants side by side, with 95% intervals over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, 2, figsize=(8, 1.2 + 0.35 * len(suite.variants)), layout="constrained", sharey=True
    )
    shown = {v.name: list(found[v.name].values()) for v in suite.variants if found[v.name]}
    for axis, measure in zip(axes, ("compression", "accuracy"), strict=True):
        for row, of_variant in enumerate(shown.values()):
            estimate = measures.over_seeds(of_variant)[measure]
            axis.plot([run[measure] for run in of_variant], [row] * len(of_variant), "|", c="0.6")
            axis.plot(estimate["value"], row, "o", c="tab:blue")
            if estimate["low"] is not None:
                axis.plot([estimate["low"], estimate["high"]], [row, row], c="tab:blue")
        label = measures.LABELS[measure]
        axis.set_xlabel(f"{label.text}, {label.unit}")
        axis.grid(axis="x", alpha=0.3)
    if bases := [run["base_accuracy"] for runs_ in shown.values() for run in runs_]:
        axes[1].axvline(sum(bases) / len(bases), c="0.4", ls="--", lw=1)
        axes[1].set_title("dashed: the base model", fontsize=9)
    axes[0].set_yticks(range(len(shown)), list(shown))
    axes[0].invert_yaxis()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def filled(path: str, blocks: Mapping[str, str]) -> str:
    """A document's text with blocks of it replaced.

    Raises:
      InputError: it cannot be read, or lacks one of the blocks.
    """
    try:
        document = pathlib.Path(path).read_text(encoding="utf-8")
        for name, block in blocks.items():
            document = text.replace_block(document, name, block)
    except (OSError, ValueError) as error:
        raise InputError(f"--doc={path} cannot be filled in: {error}") from None
    return document


def put(path: str, blocks: Mapping[str, str]) -> None:
    """Replaces blocks of a document.

    Raises:
      InputError: as in `filled`, or it cannot be written.
    """
    document = filled(path, blocks)
    with writing(path):
        pathlib.Path(path).write_text(document, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(cli.run(main))
