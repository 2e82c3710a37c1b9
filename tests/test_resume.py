"""Runs that were killed, stopped or damaged end as the run that never was, bit for bit."""

import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import ROOT, load_script

from opsdc_jax import cli, manifest
from opsdc_jax.data import open_source
from opsdc_jax.files import read_json, write_json_lines
from opsdc_jax.metrics import read_metrics
from opsdc_jax.progress import TIMES

train = load_script("train")
STEPS = 6
# All that a state can hold; a refresh after step 3; 7 problems in batches of 4: epochs end within
# steps 2 and 4.
SETTINGS = [
    f"--config={ROOT / 'configs' / 'tiny.py'}",
    f"--config.train.steps={STEPS}",
    "--config.train.batch_size=4",
    "--config.train.micro_batch_size=2",
    "--config.sampler.max_response_tokens=16",
    "--config.teacher.every=3",
    "--config.teacher.decay=0.5",
    "--config.loss.anchor=0.1",
    "--config.eval.source=none",
    "--config.checkpoint.every_steps=2",
    "--config.log.samples_every=1",
]


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    rows = open_source("tiny", seed=0).train(1, 7)
    write_json_lines(path, [{"problem": row.problem, "answer": row.answer} for row in rows])
    return path


def arguments(workdir, problems, *more):
    return [
        "train.py",
        *SETTINGS,
        f"--workdir={workdir}",
        f"--config.data.source={problems}",
        *more,
    ]


def run(workdir, problems, *more):
    return cli.run(train.main, arguments(workdir, problems, *more))


@pytest.fixture(scope="module")
def whole(problems, tmp_path_factory):
    """A run that nothing disturbed, and a copy of its folder from the middle of saving step 4.

    The copy is what a kill at that moment would have left.
    """
    folder = tmp_path_factory.mktemp("runs")

    def write_and_copy(path, about, write=manifest.write):
        if about["step"] == 4:
            shutil.copytree(folder / "whole", folder / "killed")
        write(path, about)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "write", write_and_copy)
        # The loop waits for the save, so that nothing else changes under the copy.
        patch.setattr(train.checkpoint.Checkpointer, "save", save_and_wait)
        assert run(folder / "whole", problems) == cli.EXIT_DONE
    return folder / "whole", folder / "killed"


def save_and_wait(self, state, step, save=train.checkpoint.Checkpointer.save):
    save(self, state, step)
    self._manager.wait_until_finished()


def assert_the_same(workdir, expected):
    def rows(path):
        found = read_metrics(path / "metrics.jsonl")
        return [{key: row[key] for key in row if key not in TIMES} for row in found]

    assert [row["step"] for row in rows(workdir)] == list(range(1, STEPS + 1))
    assert rows(workdir) == rows(expected)
    kept = [
        {p.name: p.read_text() for p in (run / "samples").iterdir()} for run in (workdir, expected)
    ]
    assert kept[0].keys() == kept[1].keys()
    assert kept[0] == kept[1]
    for item in ("student", "teacher", "optimizer", "base"):
        paths = [run / "checkpoints" / str(STEPS) / item for run in (workdir, expected)]
        ours, theirs = (ocp.StandardCheckpointer().restore(path) for path in paths)
        assert jax.tree.all(jax.tree.map(same_bits, ours, theirs)), item


def same_bits(ours, theirs):
    return np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_a_run_killed_while_it_saves(whole, problems, capsys):
    expected, killed = whole
    assert len(read_metrics(killed / "metrics.jsonl")) == 4
    assert sorted(p.name for p in (killed / "checkpoints").iterdir()) == [
        "2",
        "4.orbax-checkpoint-tmp",
    ]
    assert run(killed, problems) == cli.EXIT_DONE
    assert "continuing after step 2\n" in capsys.readouterr().out
    assert_the_same(killed, expected)


def test_a_run_whose_newest_checkpoint_is_damaged(whole, problems, tmp_path, capsys):
    expected, workdir = whole[0], tmp_path / "run"
    shutil.copytree(expected, workdir)
    (workdir / "eval" / "summary.json").unlink()
    data = [p for p in (workdir / "checkpoints" / "6" / "optimizer").rglob("*") if p.is_file()]
    largest = max(data, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size - 1)
    (workdir / "samples" / "step-000007.json").write_text("stale")
    assert run(workdir, problems) == cli.EXIT_DONE
    printed = capsys.readouterr().out
    assert "the checkpoint of step 6 is damaged (optimizer/" in printed
    assert "continuing after step 4\n" in printed
    assert "2 checkpoints kept" not in printed
    assert "1 checkpoints kept the loop waiting for" in printed
    assert_the_same(workdir, expected)


def test_a_run_that_is_asked_to_stop(whole, problems, tmp_path, capsys):
    """A process of its own gets SIGTERM after its first step."""
    workdir = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, ROOT / "scripts" / "train.py", *arguments(workdir, problems)[1:]],
        stdout=subprocess.PIPE,
        text=True,
    )
    while not read_metrics(workdir / "metrics.jsonl"):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == cli.EXIT_STOPPED
    last = read_metrics(workdir / "metrics.jsonl")[-1]["step"]
    assert f"stopped after step {last}: the same command continues" in printed
    assert last < STEPS
    about = read_json(workdir / "checkpoints" / str(last) / manifest.NAME)
    assert (about["step"], about["seed"], about["teacher_every"]) == (last, 0, 3)
    assert run(workdir, problems) == cli.EXIT_DONE
    assert f"continuing after step {last}\n" in capsys.readouterr().out
    assert_the_same(workdir, whole[0])


def test_a_stop_before_the_first_step_saves_nothing(problems, tmp_path, monkeypatch, capsys):
    def asked_in_start_up(settings, prepare=train.prepare):
        os.kill(os.getpid(), signal.SIGINT)
        return prepare(settings)

    monkeypatch.setattr(train, "prepare", asked_in_start_up)
    assert run(tmp_path / "run", problems) == cli.EXIT_STOPPED
    assert "stopped before the first step: the same command starts again" in capsys.readouterr().out
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_disk_that_is_full_ends_the_run_in_one_sentence(problems, tmp_path, monkeypatch, capsys):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "write", no_space)
    assert run(tmp_path / "run", problems, "--config.train.steps=1") == cli.EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert "the checkpoint of step 1 cannot be written to" in error
    assert "(No space left on device): make room" in error
    assert error.count("\n") == 1
