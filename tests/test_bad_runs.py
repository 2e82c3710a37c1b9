"""Folders of runs and of evaluations that lie, and flags of the scripts around training."""

import json
import os
import shutil

import pytest
from bad_inputs import Case, Sandbox, assert_refused, fifo, script, table
from report_run import make_run

from opsdc_jax import cli
from opsdc_jax.config import default_config
from opsdc_jax.files import write_json


def made(sandbox, **options):
    """A finished run of two steps in the sandbox, of the tiny configuration."""
    make_run(sandbox.workdir, text="x", **options)
    return sandbox.workdir


def run_of(sandbox, changes=None):
    """An unfinished run of the configuration that `sandbox.train()` has."""
    _, _, path, *_ = sandbox.train()
    settings = script_config(path)
    settings.update_from_flattened_dict({"eval.samples_per_level": 2, "train.steps": 1})
    sandbox.workdir.mkdir()
    stored = json.loads(settings.to_json())
    for key, value in (changes or {}).items():
        section, _, name = key.partition(".")
        stored[section][name] = value
    write_json(sandbox.workdir / "config.json", stored)
    return sandbox.workdir


def script_config(path):
    from helpers import load_config

    return load_config(os.path.basename(path).removesuffix(".py"))


def occupied(name, content):
    """A workdir that holds a file of this name."""

    def spoiled(sandbox):
        sandbox.file(f"run/{name}", content)
        return sandbox.train()

    return spoiled


def at(path):
    return lambda sandbox: [*sandbox.train(), "--workdir", str(path)]


def metrics(content):
    def spoiled(sandbox):
        (run_of(sandbox) / "metrics.jsonl").write_bytes(content)
        return sandbox.train()

    return spoiled


def other(sandbox):
    run_of(sandbox, {"optim.lr": 1.0})
    return sandbox.train()


def piped(sandbox):
    sandbox.workdir.mkdir()
    fifo(sandbox.workdir / "config.json")
    return sandbox.train()


def below_a_file(sandbox):
    return [*sandbox.train(), "--workdir", str(sandbox.file("file", "mine") / "run")]


def a_file(sandbox):
    return [*sandbox.train(), "--workdir", str(sandbox.file("file", "mine"))]


def finished(summary):
    """A finished run whose summary.json holds something else."""

    def spoiled(sandbox):
        run_of(sandbox)
        sandbox.file("run/eval/summary.json", summary)
        return sandbox.train()

    return spoiled


WORKDIRS: list[Case] = [
    ("a file", a_file, "file cannot be written .File exists.: make room"),
    ("below a file", below_a_file, "file/run cannot be written .Not a directory.: make room"),
    ("where nobody may write", at("/proc/run"), "/proc/run cannot be written .* choose another"),
    ("a name too long", at("x" * 300), "cannot be written .File name too long.: make room"),
    ("something else", occupied("thesis.txt", "mine"), "run is not empty and holds no run: choose"),
    ("another configuration", other, r"of another configuration .optim.lr: 1.0 -> 0.0001"),
    ("an empty config", occupied("config.json", ""), "config.json cannot be read"),
    ("a torn config", occupied("config.json", '{"seed": 0'), "config.json cannot be read"),
    ("a config of a list", occupied("config.json", "[]"), "does not hold a JSON object"),
    ("a binary config", occupied("config.json", b"\xff\x00"), "config.json cannot be read"),
    ("a pipe for a config", piped, "config.json cannot be read: it is a pipe or a device"),
    ("binary metrics", metrics(b"\xff\xff\n"), "metrics.jsonl:1 does not hold a JSON object: rem"),
    ("metrics of numbers", metrics(b"1\n"), "metrics.jsonl:1 does not hold a JSON object"),
    ("metrics without steps", metrics(b'{"loss": 1}\n'), "metrics.jsonl:1 lacks 'step'"),
    ("steps in words", metrics(b'{"step": "1"}\n'), "metrics.jsonl:1 holds 'step' of type str"),
    (
        "metrics in words",
        metrics(b'{"step": 1, "loss": "low"}\n'),
        "metrics.jsonl:1 holds 'loss' of",
    ),
    (
        "metrics of truths",
        metrics(b'{"step": 1, "loss": true}\n'),
        "metrics.jsonl:1 holds 'loss' of",
    ),
    (
        "a doubled step",
        metrics(b'{"step": 1}\n{"step": 2}\n{"step": 2}\n'),
        "metrics.jsonl:3 is of step 2, after step 2: remove",
    ),
    (
        "a torn line in between",
        metrics(b'{"step": 1}\n{"st\n{"step": 3}\n'),
        "metrics.jsonl:2 does",
    ),
    ("a summary of nothing", finished("{}"), "summary.json lacks 'benchmarks'"),
    ("a summary of a list", finished('{"benchmarks": []}'), "'benchmarks' of type list"),
    ("a torn summary", finished('{"bench'), "summary.json cannot be read"),
    (
        "a benchmark that climbs",
        finished('{"benchmarks": {"../x": {}}}'),
        "summary.json holds a benchmark '../x', which is no name of a folder",
    ),
]


def evaluate(*arguments):
    """scripts/evaluate.py on the tiny model, as small as it gets."""

    def command(sandbox):
        small = ["--samples_per_level=2", "--budget=160", "--samples=1", "--max_prompt_tokens=40"]
        basic = ["--model=tiny", "--benchmark=tiny", f"--out={sandbox.path / 'out'}"]
        return ["evaluate", *basic, *small, *arguments]

    return command


def on_file(flag, content="x"):
    return lambda s: [*evaluate()(s), f"--{flag}={s.file('file', content)}"]


def regrade(spoil):
    """--regrade of a folder in which something is wrong."""

    def command(sandbox):
        folder = made(sandbox) / "eval" / "made-up"
        settings = folder / "base.settings.json"
        marks = {"think_id": None, "end_think_id": None, "thought_open": False}
        settings.write_text(json.dumps(json.loads(settings.read_text()) | marks))
        spoil(folder)
        return ["evaluate", f"--regrade={folder / 'base.jsonl'}"]

    return command


def rewritten(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def row(**changes):
    base = {"index": 0, "sample": 0, "problem": "x", "gold": "1", "level": "", "ids": [1]}
    base |= {"text": "Answer: 1", "stopped": True} | changes
    kept = {key: value for key, value in base.items() if value is not None}
    return json.dumps(kept).encode() + b"\n"


EVALUATE: list[Case] = [
    ("no flags", lambda s: ["evaluate"], "--model is required, or --regrade"),
    ("no out", lambda s: ["evaluate", "--model=tiny"], "--out is required"),
    ("no such model", evaluate("--model=nowhere"), "model.path='nowhere' is neither a folder nor"),
    ("no such other model", evaluate("--compare=nowhere"), "'nowhere' is neither a folder nor"),
    ("no such benchmark", evaluate("--benchmark=nothing"), "eval.source='nothing' is not known"),
    ("no benchmark at all", evaluate("--benchmark=none"), "--benchmark=none leaves nothing to do"),
    ("no samples", evaluate("--samples=0"), "eval.samples=0 must be positive"),
    ("half a sample", evaluate("--samples=1.5"), "samples=1.5"),
    ("hot as nan", evaluate("--temperature=nan"), "eval.temperature=nan must be a finite number"),
    ("top_p of 2", evaluate("--top_p=2"), "eval.top_p=2.0 must be above 0 and at most 1"),
    ("cold samples", evaluate("--temperature=0", "--samples=4"), "would all be the same"),
    ("a huge budget", evaluate("--budget=100000"), "--budget=100000 is too much"),
    ("a small prompt", evaluate("--max_prompt_tokens=3"), "max_prompt_tokens=3 cannot hold"),
    ("no such dtype", evaluate("--dtype=int4"), "model.compute_dtype='int4' is not one of"),
    ("no such instruction", evaluate("--instruction=v9"), "prompts.instruction='v9'"),
    ("too few devices", evaluate("--tensor=7"), "mesh .*does not multiply to the"),
    ("out is a file", on_file("out"), "cannot be written|Not a directory"),
    ("out is a run", lambda s: [*evaluate()(s), f"--out={made(s)}"], "is the folder of a training"),
    ("unknown flag", evaluate("--budgte=3"), "budgte.*budget"),
    (
        "regrade nothing",
        lambda s: ["evaluate", "--regrade=nowhere"],
        "nowhere is no <system>.jsonl",
    ),
    (
        "regrade an empty folder",
        lambda s: ["evaluate", f"--regrade={s.path}"],
        "holds no responses",
    ),
    (
        "regrade a file",
        lambda s: ["evaluate", f"--regrade={s.file('a.txt', '')}"],
        "is no <system>",
    ),
    ("no settings", regrade(lambda f: (f / "base.settings.json").unlink()), "does not exist"),
    ("damaged settings", regrade(rewritten("base.settings.json", b"{}")), "lacks 'think_id'"),
    ("no responses", regrade(rewritten("base.jsonl", b"")), "base.jsonl is empty: finish"),
    ("torn responses", regrade(rewritten("base.jsonl", row() + b'{"in')), "base.jsonl:2 does not"),
    ("binary responses", regrade(rewritten("base.jsonl", b"\xff")), "base.jsonl cannot be read"),
    ("a response without text", regrade(rewritten("base.jsonl", row(text=None))), "lacks 'text'"),
    ("a text of a number", regrade(rewritten("base.jsonl", row(text=1))), "'text' of type int"),
    ("ids in words", regrade(rewritten("base.jsonl", row(ids="12"))), "'ids' of type str"),
]


def report(spoil, **options):
    """scripts/report.py on a run in which something is wrong."""

    def command(sandbox):
        spoil(made(sandbox, **options))
        return ["report", f"--workdir={sandbox.workdir}"]

    return command


REPORT: list[Case] = [
    ("no workdir", lambda s: ["report"], "--workdir DIR is required"),
    ("no such run", lambda s: ["report", "--workdir=nowhere"], "nowhere holds no run: give"),
    ("damaged config", report(rewritten("config.json", b"{}")), "it lacks"),
    ("a seed in words", report(rewritten("config.json", b'{"seed": "x"}')), "it lacks|seed"),
    (
        "damaged metrics",
        report(rewritten("metrics.jsonl", b"7\n")),
        "metrics.jsonl:1 does not hold",
    ),
    ("summary of a list", report(rewritten("eval/summary.json", b"[]")), "not hold a JSON object"),
    (
        "damaged summary",
        report(rewritten("eval/summary.json", b'{"benchmarks": {"a": {"systems": 1}}}')),
        "summary.json lacks 'settings'",
    ),
    (
        "damaged views",
        report(rewritten("samples/tokens-000001.jsonl", b'{"problem": "x"}\n')),
        "tokens-000001.jsonl:1 lacks 'stopped'",
    ),
    (
        "damaged grades",
        report(rewritten("eval/made-up/base.grades.jsonl", b'{"index": 0}\n')),
        "base.grades.jsonl:1 lacks 'level'",
    ),
    (
        "damaged responses",
        report(rewritten("eval/made-up/base.jsonl", b'{"index": 0}\n')),
        "base.jsonl:1 lacks 'sample'",
    ),
]


def export(*arguments):
    return lambda sandbox: ["export", f"--out={sandbox.path / 'out'}", *arguments]


def exported(changes):
    def command(sandbox):
        run = run_of(sandbox, changes)
        (run / "checkpoints").mkdir()
        return ["export", f"--checkpoint={run}", f"--out={sandbox.path / 'out'}"]

    return command


EXPORT: list[Case] = [
    ("no run", export(), "--checkpoint DIR is required"),
    ("no such run", export("--checkpoint=nowhere"), "config.json does not exist"),
    ("no checkpoints", lambda s: export(f"--checkpoint={run_of(s)}")(s), "holds no checkpoints"),
    ("no finished checkpoint", exported({}), "holds no finished checkpoint"),
    ("a model that is gone", exported({"model.path": "gone"}), "model.path='gone' is neither"),
    ("a model of a number", exported({"model.path": 7}), "model.path=7 must be a text"),
    ("int8", export("--checkpoint=x", "--dtype=int8"), "dtype.*float32.*bfloat16"),
    ("out is there", lambda s: export("--checkpoint=x", f"--out={s.path}")(s), "exists already"),
]


def sample(*arguments):
    return lambda sandbox: ["sample", "--model=tiny", "--prompt=start 1 + 2", *arguments]


SAMPLE: list[Case] = [
    ("no model", lambda s: ["sample", "--prompt=x"], "--model is required"),
    ("no prompt", lambda s: ["sample", "--model=tiny"], "--prompt is required"),
    ("an empty prompt", sample("--prompt="), "--prompt is required"),
    ("a blank prompt", sample("--prompt=  "), "--prompt cannot be used: the text is empty"),
    ("no such model", sample("--model=nowhere"), "model.path='nowhere' is neither"),
    ("a control token", sample("--prompt=<|im_start|>"), "cannot be used: .*a control token"),
    ("a long prompt", sample("--prompt=" + "start " * 600), "cannot be used: a prompt is over 511"),
    ("a huge prompt", sample("--prompt=" + "start " * 20_000), "cannot be used: a prompt is over"),
    ("a huge budget", sample("--max_tokens=9999"), "--max_tokens=9999 exceeds the"),
    ("a negative budget", sample("--max_tokens=-1"), "max_tokens"),
    ("top_p of 0", sample("--top_p=0"), "--top_p=0 keeps no token"),
    ("hot as nan", sample("--temperature=nan"), "temperature.*nan"),
    ("hot as inf", sample("--temperature=inf"), "temperature.*inf"),
    ("seed", sample(f"--seed={2**40}"), "seed"),
    ("no such template", sample("--template=x"), "template"),
    ("no such instruction", sample("--instruction=v9"), "prompts.instruction='v9'"),
    ("no such dtype", sample("--dtype=fp8"), "dtype"),
]


def plan(*arguments):
    return lambda sandbox: ["plan", *sandbox.train()[1:3], *arguments]


PLAN: list[Case] = [
    ("no topology", plan(), "--topology is required"),
    ("no such topology", plan("--topology=v9:4x4"), "topology 'v9:4x4' is not known"),
    ("no shape", plan("--topology=v5e"), "a v5e slice is written with 2 sizes"),
    ("a slice of 0", plan("--topology=v5e:0x4"), "a v5e slice is written with 2 sizes"),
    ("no device", plan("--topology=cpu:0"), "write cpu:COUNT"),
    ("more devices than anyone has", plan(f"--topology=cpu:{10**9}"), "cpu:10.* at most"),
    ("more chips", plan(f"--topology=v5e:{10**6}x{10**6}"), "topology .* at most"),
    ("more GPUs", plan(f"--topology=gpu:{10**9}xH100"), "topology .* at most"),
    ("no such GPU", plan("--topology=gpu:8xH900"), "write gpu:COUNTxKIND"),
    ("no such axis", plan("--topology=cpu:2", "--mesh=rows=2"), "--mesh 'rows=2': write AXIS=SIZE"),
    ("another size", plan("--topology=cpu:2", "--mesh=fsdp=3"), "does not multiply to the 2"),
    ("no such family", plan("--search", "--topology=v9"), "of a family, not of 'v9'"),
    ("no such model", plan("--topology=cpu:1", "--config.model.path=x"), "is neither a folder nor"),
    ("a bad value", plan("--topology=cpu:1", "--config.seed=-1"), "seed=-1 must not be negative"),
]


@table(WORKDIRS + EVALUATE + REPORT + EXPORT + SAMPLE + PLAN)
def test_refused(tmp_path, capfd, monkeypatch, arguments, says):
    assert_refused(Sandbox(tmp_path), capfd, monkeypatch, arguments, says)


def test_a_workdir_in_a_full_file_system(tmp_path, monkeypatch):
    """What a refused write had begun is gone again."""
    from opsdc_jax.config import InputError
    from opsdc_jax.workdir import Workdir

    def no_room(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", no_room)
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        Workdir(tmp_path / "a" / "run", default_config()).create()
    assert list(tmp_path.iterdir()) == []


def test_the_report_of_hostile_names_stays_in_its_folder(tmp_path, capsys):
    """A level is a text of the data's; it becomes part of the name of a figure."""
    run = made(Sandbox(tmp_path))
    for path in (run / "eval" / "made-up").glob("*.jsonl"):
        path.write_text(path.read_text().replace('"easy"', json.dumps("../../" + "é" * 300)))
    (run / "eval" / "summary.json").unlink()
    (run / "samples" / "tokens-x.jsonl").write_text("not a step")
    before = {path for path in tmp_path.rglob("*") if "plots" not in path.parts}
    assert cli.run(script("report").main, ["report.py", f"--workdir={run}"]) == cli.EXIT_DONE
    after = {path for path in tmp_path.rglob("*") if "plots" not in path.parts}
    assert after - before == {run / "report.html"}
    assert shutil.rmtree(run / "plots") is None
