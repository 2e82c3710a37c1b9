"""scripts/train.py as a user runs it, in miniature: artefacts, resume, bad input."""

import contextlib
import errno
import json
import shutil

import jax
import numpy as np
import pytest
from helpers import ROOT, full_disk, load_script
from ml_collections import ConfigDict

from opsdc_jax import cli
from opsdc_jax.checkpoint import Checkpointer
from opsdc_jax.files import read_json, read_json_lines
from opsdc_jax.metrics import CompileCounter, read_metrics
from opsdc_jax.models import hf, qwen3, weights
from opsdc_jax.parts import prepare
from opsdc_jax.progress import TIMES
from opsdc_jax.rollout import Rollout
from opsdc_jax.sampler import Sampler
from opsdc_jax.samples import SampleWriter
from opsdc_jax.tiny import BASE_FOLDER

train = load_script("train")
TINY = ["train.py", "--config", str(ROOT / "configs" / "tiny.py")]
SMALL = [
    "--config.train.steps=4",
    "--config.train.batch_size=4",
    "--config.train.micro_batch_size=2",
    "--config.sampler.max_response_tokens=24",
    "--config.teacher.every=2",
    "--config.eval.every=0",
    "--config.eval.samples_per_level=4",
    "--config.eval.batch_size=12",
    "--config.eval.max_response_tokens=160",
    "--config.checkpoint.every_steps=2",
    "--config.log.samples_every=3",
    "--config.log.samples=2",
    "--config.log.tensorboard=True",
]


SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")


def run(workdir, *more):
    return cli.run(train.main, [*TINY, *SMALL, "--workdir", str(workdir), *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    with (
        pytest.MonkeyPatch.context() as patch,
        (workdir.parent / "output.txt").open("w") as output,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        for name in SECRETS:
            patch.setenv(name, f"canary-{name}")
        assert run(workdir) == cli.EXIT_DONE
    return workdir


def test_a_run_keeps_no_secret(finished):
    files = [path for path in finished.parent.rglob("*") if path.is_file()]
    assert finished.parent / "output.txt" in files
    assert [path for path in files if b"canary-" in path.read_bytes()] == []


def test_the_run_leaves_everything_behind(finished):
    rows = read_metrics(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0].keys() >= {
        "step",
        "loss",
        "response_tokens",
        "student_entropy",
        "teacher_entropy",
        "truncated",
        "logprob_gap_mean",
        "logprob_gap_max",
        "grad_norm",
        "tokens_per_s",
        "padding_efficiency",
    }
    assert all(0.5 < row["padding_efficiency"] <= 1 for row in rows)
    assert all(0 < row["logprob_gap_mean"] <= row["logprob_gap_max"] <= 1e-4 for row in rows)
    assert all(row["loss"] > 0 for row in rows)
    config = json.loads((finished / "config.json").read_text())
    assert config["train"]["steps"] == 4
    assert config["optim"]["lr"] == 1e-4
    assert (finished / "checkpoints" / "4").is_dir()
    assert any((finished / "tensorboard").iterdir())


def test_the_run_ends_with_its_report(finished):
    page = (finished / "report.html").read_text()
    for part in ("results", "training", "lengths", "answers", "tokens", "words", "settings"):
        assert f'<section id="{part}"' in page
    assert "After 4 steps the student answers in" in page
    assert (finished / "plots" / "loss.svg").exists()
    assert (finished / "plots" / "accuracy-tokens-tiny.svg").exists()


def test_the_summary_holds_the_three_systems(finished):
    summary = json.loads((finished / "eval" / "summary.json").read_text())
    tiny = summary["benchmarks"]["tiny"]
    assert list(tiny["systems"]) == ["base", "concise_prompt", "student"]
    for system in tiny["systems"].values():
        assert system["overall"]["problems"] == 12
        assert list(system["by_level"]) == ["easy", "medium", "hard"]
        for statistics in system["by_level"].values():
            assert statistics.keys() == system["overall"].keys()
    base, concise = (
        tiny["systems"][name]["overall"]["tokens"]["mean"]["value"]
        for name in ("base", "concise_prompt")
    )
    assert concise < base
    assert [point["step"] for point in tiny["curve"]] == [0, 4]
    assert tiny["systems"]["student"]["settings"]["weights"] == "step 4"


def test_every_response_of_the_evaluation_is_kept(finished):
    folder = finished / "eval" / "tiny"
    for system in ("base", "concise_prompt", "student-000004"):
        rows = list(read_json_lines(folder / f"{system}.jsonl"))
        assert [(row["index"], row["sample"]) for row in rows] == [(i, 0) for i in range(12)]
        assert all(len(row["text"].split()) == len(row["ids"]) - row["stopped"] for row in rows)
        assert len(list(read_json_lines(folder / f"{system}.grades.jsonl"))) == 12


def test_evaluation_can_be_off(tmp_path, capsys):
    workdir = tmp_path / "run"
    assert run(workdir, "--config.eval.source=none", "--config.train.steps=1") == cli.EXIT_DONE
    assert "no evaluation" in capsys.readouterr().out
    assert "Nothing was evaluated" in (workdir / "report.html").read_text()
    assert json.loads((workdir / "eval" / "summary.json").read_text()) == {"benchmarks": {}}


@pytest.mark.parametrize(
    ("name", "there", "absent"),
    [
        ("tiny_sft", {"correct"}, {"logprob_gap_mean", "reward"}),
        ("tiny_policy_gradient", {"logprob_gap_mean", "correct", "reward"}, set()),
    ],
)
def test_the_baselines_are_configurations_of_the_same_loop(
    tmp_path, monkeypatch, name, there, absent
):
    """The first with a gate, too."""
    asked = []

    def recorded(self, params, prompts, *rest, start=Sampler.start):
        asked.append((np.array(params["embedding"]), prompts[0]))
        return start(self, params, prompts, *rest)

    monkeypatch.setattr(Sampler, "start", recorded)
    arguments = [
        *("train.py", f"--config={ROOT / 'configs' / name}.py", *SMALL),
        *("--config.teacher.every=0", "--config.train.steps=2", "--config.eval.source=none"),
        *("--config.sampler.max_response_tokens=96", "--config.checkpoint.every_steps=0"),
        f"--config.loss.only_correct={name == 'tiny_sft'}",
        "--config.train.micro_batch_size=4",
        *("--workdir", str(tmp_path / "run")),
    ]
    assert cli.run(train.main, arguments) == cli.EXIT_DONE
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 2
    for row in rows:
        assert row.keys() >= there
        assert not row.keys() & absent
    assert sum(row["correct"] for row in rows) > 0
    by_the_teacher = name == "tiny_sft"  # at its own prompt, and it does not change
    (before, prompt), (after, _) = asked
    assert np.array_equal(before, after) == by_the_teacher
    assert ("Be direct" in hf.load_tokenizer(BASE_FOLDER).decode(prompt)) == by_the_teacher
    assert (tmp_path / "run" / "report.html").exists()


def test_the_host_asks_and_writes_while_the_device_works(tmp_path, monkeypatch):
    """After a step's update is under way, and before anything waits for its metrics."""
    calls = []

    def recorded(owner, name):
        function = getattr(owner, name)

        def record(*arguments, **options):
            calls.append(name)
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, record)

    recorded(train, "batch_of")
    recorded(train.SampleWriter, "start")
    recorded(train.SampleWriter, "finish")
    recorded(train.Progress, "print_pending")
    make = train.distill.make_train_step

    def watched(*arguments, **options):
        jitted = make(*arguments, **options)
        applied = lambda *state: calls.append("apply") or jitted.apply(*state)  # noqa: E731
        return jitted._replace(apply=applied)

    monkeypatch.setattr(train.distill, "make_train_step", watched)
    small = ["--config.eval.source=none", "--config.train.steps=2", "--config.log.samples_every=2"]
    assert run(tmp_path / "run", *small, "--config.checkpoint.every_steps=0") == cli.EXIT_DONE
    step = ["print_pending", "start", "apply", "batch_of", "finish"]
    assert calls == ["batch_of", *step, *step, "print_pending"]


def test_samples_hold_the_sampled_ids(finished):
    names = [f"{kind}-00000{step}" for kind in ("step", "tokens") for step in (1, 3, 4)]
    assert sorted(path.stem for path in (finished / "samples").iterdir()) == names
    samples = json.loads((finished / "samples" / "step-000003.json").read_text())
    assert len(samples) == 2
    for sample in samples:
        assert 0 < len(sample["ids"]) <= 24
        assert sample["stopped"] == sample["text"].endswith("<|im_end|>")
        assert len(sample["text"].split()) == len(sample["ids"])


def test_the_kl_of_all_tokens_is_the_loss_of_their_step(finished):
    """The same student, teacher and rollouts: here all rollouts of a step are compared."""
    losses = {row["step"]: row["loss"] for row in read_metrics(finished / "metrics.jsonl")}
    for step in (1, 3, 4):
        rollouts = list(read_json_lines(finished / "samples" / f"tokens-{step:06d}.jsonl"))
        assert len(rollouts) == 4
        kl = [value for rollout in rollouts for value in rollout["kl"]]
        assert sum(kl) / len(kl) == pytest.approx(losses[step], rel=1e-4)
        assert all("".join(r["tokens"]).split()[0] == "<think>" for r in rollouts)


def test_a_checkpoint_gives_the_views_of_the_next_step_again(finished):
    """Step 3 is sampled by the student of step 2, which step 2 also made the teacher."""
    settings = ConfigDict(read_json(finished / "config.json"))
    parts = prepare(settings)
    like = jax.tree.map(
        lambda leaf, placed: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed),
        qwen3.abstract_params(parts.model),
        parts.shardings,
    )
    with Checkpointer(finished / "checkpoints", settings.checkpoint.keep) as checkpoints:
        params = checkpoints.restore_student(2, like)
    samples = json.loads((finished / "samples" / "step-000003.json").read_text())
    sampled = Rollout(
        tokens_BxR=np.array(
            [sample["ids"] + [0] * (24 - len(sample["ids"])) for sample in samples]
        ),
        lengths_B=np.array([len(sample["ids"]) for sample in samples]),
        stopped_B=np.array([sample["stopped"] for sample in samples]),
        logprobs_BxR=np.zeros((2, 24), np.float32),
    )
    problems = [sample["problem"] for sample in samples]
    viewer = SampleWriter.of_run(settings, parts, finished / "samples").viewer
    started = viewer.start(
        params,
        params,
        sampled,
        [parts.prompts.student(problem) for problem in problems],
        [parts.prompts.teacher(problem) for problem in problems],
        count=2,
    )
    views = viewer.finish(started)
    written = list(read_json_lines(finished / "samples" / "tokens-000003.jsonl"))
    for view, row in zip(views, written, strict=False):
        assert view == {key: row[key] for key in view}


def test_steps_of_known_shapes_compile_nothing(finished):
    """Two buckets, each first used early: whatever compiles later would show in the count."""
    counts = [row["compilations"] for row in read_metrics(finished / "metrics.jsonl")]
    assert counts[-1] == counts[-2]


def test_a_finished_run_prints_its_table_and_compiles_nothing(finished, capsys):
    counter = CompileCounter()
    assert run(finished) == cli.EXIT_DONE
    assert "| student, plain prompt" in capsys.readouterr().out
    assert counter.count == 0


def test_a_run_killed_in_its_last_evaluation_is_evaluated_when_it_continues(
    finished, tmp_path, monkeypatch, capsys
):
    class KilledError(Exception):
        pass

    def killed_at_the_end(self, system, params, stop_asked, run=train.Evaluator.run):
        if system.name == "student-000004":
            raise KilledError
        return run(self, system, params, stop_asked)

    workdir = tmp_path / "run"
    monkeypatch.setattr(train.Evaluator, "run", killed_at_the_end)
    with pytest.raises(KilledError):
        run(workdir)
    monkeypatch.undo()
    capsys.readouterr()
    assert run(workdir) == cli.EXIT_DONE
    printed = capsys.readouterr().out
    assert "continuing after step 4" in printed
    assert "step 5" not in printed
    summaries = [(path / "eval" / "summary.json").read_text() for path in (workdir, finished)]
    assert summaries[0] == summaries[1]
    assert len(read_metrics(workdir / "metrics.jsonl")) == 4


@pytest.fixture
def described(capsys, monkeypatch):
    """A function that runs up to the training and returns what was printed."""

    class StopError(Exception):
        pass

    def stop(*_):
        raise StopError

    def run_and_stop(*arguments):
        monkeypatch.setattr(train, "train", stop)
        with pytest.raises(StopError):
            run(*arguments)
        return capsys.readouterr().out

    return run_and_stop


@pytest.mark.parametrize(("slots", "used"), [(0, 0), (2, 2), (4, 0), (6, 0)])
def test_no_more_slots_than_rollouts_decode(finished, slots, used):
    settings = ConfigDict(read_json(finished / "config.json"))
    settings.sampler.slots = slots
    assert prepare(settings).sampler.slots == used


def test_the_plan_and_both_prompts_are_printed(tmp_path, described):
    printed = described(tmp_path / "run")
    assert "refreshed every 2 steps" in printed
    assert "4 steps of 4 rollouts" in printed
    assert "<|im_start|> user start" in printed
    assert "<|im_start|> user Be direct ." in printed
    assert printed.count("<|im_end|> <|im_start|> assistant") == 2


def test_a_killed_run_continues_as_if_it_had_never_stopped(finished, tmp_path, monkeypatch):
    class KilledError(Exception):
        pass

    def killed_at_step_4(self, step, *arguments, add=train.Progress.add):
        if step == 4:
            raise KilledError
        add(self, step, *arguments)

    workdir = tmp_path / "run"
    monkeypatch.setattr(train.Progress, "add", killed_at_step_4)
    with pytest.raises(KilledError):
        run(workdir)
    monkeypatch.undo()
    assert run(workdir) == cli.EXIT_DONE

    def values(path):
        rows = read_metrics(path / "metrics.jsonl")
        return [{key: row[key] for key in row if key not in TIMES} for row in rows]

    assert values(workdir) == values(finished)
    summaries = [(path / "eval" / "summary.json").read_text() for path in (workdir, finished)]
    assert summaries[0] == summaries[1]


def test_a_new_run_goes_beside_a_finished_one_and_takes_over_its_base(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "tiny")
    assert run(tmp_path / "tiny", "--new_if_finished") == cli.EXIT_DONE
    printed = capsys.readouterr().out
    assert f"workdir  {tmp_path / 'tiny-2'}" in printed
    for system, taken_over in (("base", True), ("concise_prompt", True), ("student-000004", False)):
        responses = tmp_path / "tiny-2" / "eval" / "tiny" / f"{system}.jsonl"
        assert (f"{responses}: taken over from" in printed) == taken_over
    summaries = [(path / "eval" / "summary.json").read_text() for path in tmp_path.iterdir()]
    assert len(summaries) == 2
    assert summaries[0] == summaries[1] == (finished / "eval" / "summary.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.train.stpes=1"], "did you mean config.train.steps?"),
        (
            ["--config.model.path=/nowhere"],
            "model.path='/nowhere' is neither a folder nor a hub id",
        ),
        (["--config.teacher.every=-1"], "teacher.every=-1 must not be negative"),
        (["--config.sampler.max_prompt_tokens=9"], "max_prompt_tokens=9 cannot hold a prompt of"),
        (
            ["--config.sampler.max_prompt_tokens=9", "--config.eval.source=none"],
            "max_prompt_tokens=9 cannot hold a prompt of",
        ),
        (["--config.sampler.max_response_tokens=9999"], "exceeds the model's"),
        (["--config.train.micro_batch_size=3"], "is not a multiple of"),
        (["--config.prompts.instruction=v7"], "prompts.instruction='v7'"),
        (["--config.prompts.template=none"], "prompts.template='none'"),
        (["--config.data.source=nothing"], "data.source='nothing'"),
        (["--config.mesh.tensor=3"], "mesh"),
        (["--config.optim.lr=fast"], "config.optim.lr=fast"),
    ],
)
def test_bad_input_stops_before_any_compilation(tmp_path, capsys, arguments, message):
    counter = CompileCounter()
    assert run(tmp_path / "run", *arguments) == cli.EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists(), "bad input leaves nothing behind"
    assert counter.count == 0


SCRIPTS = ["train", "evaluate", "report", "sample", "export", "rehearse", "soak"]
SCRIPTS += ["bench_demo", "bench_intervals", "bench_report"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_explains_itself(script, capsys):
    module = load_script(script)
    with pytest.raises(SystemExit) as exit_:
        cli.run(module.main, [f"{script}.py", "--help"])
    assert exit_.value.code == cli.EXIT_DONE
    printed = capsys.readouterr().out
    assert printed.startswith(module.__doc__)
    assert "--" in printed.removeprefix(module.__doc__)


def test_a_workdir_of_another_config_is_refused(finished, capsys):
    assert run(finished, "--config.seed=5") == cli.EXIT_BAD_INPUT
    assert "seed: 0 -> 5" in capsys.readouterr().err


def test_an_unwritable_workdir_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file" / "run") == cli.EXIT_BAD_INPUT
    assert "cannot be written" in capsys.readouterr().err


def test_the_exported_student_is_an_ordinary_folder(finished, tmp_path, capsys):
    export = load_script("export")
    arguments = ["export.py", "--checkpoint", str(finished), "--out", str(tmp_path / "student")]
    assert cli.run(export.main, [*arguments, "--dtype", "float32"]) == cli.EXIT_DONE
    assert "student of step 4" in capsys.readouterr().out
    base, student = (hf.load_config(path) for path in (BASE_FOLDER, tmp_path / "student"))
    assert base == student
    moved = jax.tree.map(
        lambda a, b: float(abs(a - b).max()),
        weights.load_params(BASE_FOLDER, base),
        weights.load_params(tmp_path / "student", student),
    )
    largest = max(jax.tree.leaves(moved))
    assert 0 < largest < 0.01, "trained, but only by four small steps"
    tokenizers = [hf.load_tokenizer(path) for path in (BASE_FOLDER, tmp_path / "student")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    assert cli.run(export.main, arguments) == cli.EXIT_BAD_INPUT
    assert "exists already" in capsys.readouterr().err


def test_an_export_that_fails_leaves_nothing(finished, tmp_path, monkeypatch, capsys):
    export = load_script("export")
    (tmp_path / "file").write_text("")
    arguments = ["export.py", "--checkpoint", str(finished), "--out"]
    assert cli.run(export.main, [*arguments, str(tmp_path / "file" / "x")]) == cli.EXIT_BAD_INPUT
    assert "cannot be written" in capsys.readouterr().err

    def no_space(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    def assert_refused(reason):
        assert cli.run(export.main, [*arguments, str(tmp_path / "student")]) == cli.EXIT_BAD_INPUT
        error = capsys.readouterr().err
        assert f"student cannot be written ({reason}): make room" in error
        assert error.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    with full_disk(2000):  # the weights do not fit
        assert_refused("File too large")
    # The tokenizer's library says it in its own words.
    monkeypatch.setattr(weights.safetensors.numpy, "save_file", lambda *_, **__: None)
    with full_disk(2000):
        assert_refused("File too large")
    monkeypatch.setattr(weights.safetensors.numpy, "save_file", no_space)
    assert_refused("No space left on device")


def test_an_export_needs_the_host_as_a_device(finished, tmp_path, monkeypatch, capsys):
    def no_cpu(*_):
        raise RuntimeError("Unknown backend cpu")

    export = load_script("export")
    monkeypatch.setattr(export.jax, "devices", no_cpu)
    arguments = ["--checkpoint", str(finished), "--out", str(tmp_path / "student")]
    assert cli.run(export.main, ["export.py", *arguments]) == cli.EXIT_BAD_INPUT
    assert "add cpu to JAX_PLATFORMS" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x"], "--checkpoint DIR is required"),
        (["--checkpoint", "nowhere", "--out", "x"], "config.json does not exist"),
        (["--checkpoint", "nowhere", "--out", "x", "--dtype", "int8"], "dtype"),
    ],
)
def test_bad_exports_are_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.run(load_script("export").main, ["export.py", *arguments]) == cli.EXIT_BAD_INPUT
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
