"""A saved train state comes back bit for bit, or the one before it does."""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import re
import shutil
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import SMALL, full_disk, random_params

from opsdc_jax import distill, manifest, sharding
from opsdc_jax.checkpoint import Checkpointer, newest_good, recover
from opsdc_jax.config import InputError
from opsdc_jax.distill import TrainState

OPTIMIZER = distill.make_optimizer(
    types.SimpleNamespace(
        lr=1e-2, warmup_steps=2, b1=0.9, b2=0.95, weight_decay=0.01, clip_norm=1.0
    )
)


@pytest.fixture(scope="module")
def state():
    student = random_params(SMALL, 0)
    teacher = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(SMALL, 1))
    return TrainState(student, teacher, OPTIMIZER.init(student), jnp.int32(3))


def same(left, right):
    def equal(a, b):
        return a.dtype == b.dtype and a.sharding == b.sharding and bool(jnp.array_equal(a, b))

    return jax.tree.all(jax.tree.map(equal, left, right))


def test_save_and_restore(tmp_path, state):
    with Checkpointer(tmp_path / "checkpoints", keep=2) as checkpoints:
        assert newest_good(tmp_path / "checkpoints") == (0, {})
        checkpoints.save(state, 3)
    assert newest_good(tmp_path / "checkpoints") == (3, {})
    with Checkpointer(tmp_path / "checkpoints", keep=2) as checkpoints:
        blank = jax.tree.map(jnp.zeros_like, state)
        assert same(checkpoints.restore(3, like=blank), state)


def test_the_base_is_saved_where_there_is_one(tmp_path, state):
    """A run without an anchor keeps the layout it always had."""
    base = random_params(SMALL, 2)
    anchored = dataclasses.replace(state, base=base)
    for name, kept, more in (("plain", state, set()), ("anchored", anchored, {"base"})):
        with Checkpointer(tmp_path / name, keep=1) as checkpoints:
            checkpoints.save(kept, 3)
        with Checkpointer(tmp_path / name, keep=1) as checkpoints:
            assert same(checkpoints.restore(3, like=jax.tree.map(jnp.zeros_like, kept)), kept)
        there = {path.name for path in (tmp_path / name / "3").iterdir() if path.is_dir()}
        assert there == {"student", "teacher", "optimizer"} | more


def test_the_student_alone(tmp_path, state):
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state, 1)
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        assert same(checkpoints.restore_student(1, like=state.student), state.student)


def test_only_the_newest_are_kept_and_a_step_is_saved_once(tmp_path, state):
    with Checkpointer(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 3):
            checkpoints.save(state, step)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit()) == ["2", "3"]


def test_saving_does_not_hold_the_state_hostage(tmp_path, state):
    """The save copies before it returns: donating the state right after loses nothing."""
    donated = jax.tree.map(jnp.copy, state)
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        checkpoints.save(donated, 3)
        for leaf in jax.tree.leaves(donated):
            leaf.delete()
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        assert same(checkpoints.restore(3, like=state), state)


def steps(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def test_the_best_is_kept_besides_the_newest(tmp_path, state):
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        for step, best in ((1, 0), (2, 0), (3, 2), (4, 2), (5, 4), (6, 4)):
            checkpoints.best = best
            checkpoints.save(state, step)
    assert steps(tmp_path) == [4, 6]


def test_a_save_is_overdue_after_so_many_minutes(tmp_path, state, monkeypatch):
    clock = iter([0.0, 59.0, 61.0, 70.0, 129.0, 131.0, 9999.0])
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        monkeypatch.setattr(
            "opsdc_jax.checkpoint.time",
            types.SimpleNamespace(monotonic=lambda: next(clock), perf_counter=lambda: 0.0),
        )
        checkpoints._saved_at = next(clock)
        assert [checkpoints.overdue(1.0) for _ in range(2)] == [False, True]
        checkpoints.save(state, 1)
        assert [checkpoints.overdue(1.0) for _ in range(2)] == [False, True]
        assert not checkpoints.overdue(0.0)


def test_a_manifest_says_what_the_checkpoint_is(tmp_path, state):
    with Checkpointer(tmp_path, keep=1, about={"seed": 7}) as checkpoints:
        checkpoints.save(state, 3)
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        assert checkpoints.made_elsewhere(3) == ""
        stored = json.loads((tmp_path / "3" / "manifest.json").read_text())
        assert (stored["step"], stored["best"], stored["seed"]) == (3, 0, 7)
        stored["made_by"]["cpu_threads"] = 96
        (tmp_path / "3" / "manifest.json").write_text(json.dumps(stored))
        assert "cpu_threads: 96 -> " in checkpoints.made_elsewhere(3)


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpointer(folder, keep=2) as checkpoints:
        for step in (10, 20):
            checkpoints.save(state, step)
    return folder


@pytest.fixture
def saved(two_saved, tmp_path):
    """A copy of two checkpoints, of steps 10 and 20, and the largest data file of the second."""
    shutil.copytree(two_saved, tmp_path / "checkpoints")
    data = (tmp_path / "checkpoints" / "20" / "teacher").rglob("*")
    return tmp_path / "checkpoints", max(data, key=lambda path: path.stat().st_size)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, r"teacher/.* has [\d,]+ of [\d,]+ bytes"),
        (flip_a_bit, r"teacher/.* has other contents"),
        (pathlib.Path.unlink, r"teacher/.* is missing"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(saved, capsys, damage, reason):
    folder, data = saved
    damage(data)
    step, wrong = newest_good(folder)
    assert step == 10
    assert wrong.keys() == {20}
    assert re.match(reason, wrong[20])
    assert steps(folder) == [10, 20], "looking deletes nothing"
    assert recover(folder) == 10
    assert re.search(rf"of step 20 is damaged \({reason}", capsys.readouterr().out)
    assert steps(folder) == [10]


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"files": {"a": 1}}'])
def test_a_checkpoint_without_its_manifest_is_not_good(saved, content):
    folder, _ = saved
    path = folder / "20" / manifest.NAME
    path.unlink() if content is None else path.write_text(content)
    assert newest_good(folder)[0] == 10


@pytest.mark.parametrize(
    "change", [{"step": 10}, {"files": {}}, {"made_by": None}, {"files": {"\0": {}}}]
)
def test_a_manifest_that_says_too_little_or_of_another_step_is_not_good(saved, change):
    folder, _ = saved
    path = folder / "20" / manifest.NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert newest_good(folder) == (10, {20: "manifest.json is damaged"})


@pytest.mark.parametrize("reader", ["check_regular", "_digest"])
def test_a_disk_that_fails_for_a_while_costs_no_checkpoint(saved, monkeypatch, reader):
    folder, _ = saved

    def fails(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(manifest, reader, fails)
    with pytest.raises(InputError, match=r"20/.* cannot be read \(Input/output error\): try again"):
        recover(folder)
    assert steps(folder) == [10, 20]


def test_what_a_killed_save_left_is_removed(saved):
    folder, _ = saved
    (folder / "20").rename(folder / "20.orbax-checkpoint-tmp")
    (folder / "notes").mkdir()
    assert recover(folder) == 10
    assert sorted(path.name for path in folder.iterdir()) == ["10", "notes"]
    assert recover(folder / "absent") == 0


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(saved):
    folder, data = saved
    truncate(data)
    (folder / "10" / manifest.NAME).unlink()
    with pytest.raises(InputError, match=r"no checkpoint in .* is whole \(20: .*; 10: "):
        recover(folder)
    assert steps(folder) == [10, 20]


def test_a_link_is_removed_and_what_it_leads_to_is_not(saved, tmp_path):
    folder, _ = saved
    (folder / "20").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / manifest.NAME).unlink()
    (folder / "20").symlink_to(tmp_path / "elsewhere")
    assert recover(folder) == 10
    assert steps(folder) == [10]
    assert (tmp_path / "elsewhere" / "teacher").is_dir()


@pytest.mark.parametrize("where", ["data", "manifest"])
def test_a_full_disk_costs_no_checkpoint_that_was_there(saved, state, monkeypatch, where):
    folder, _ = saved

    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "manifest":
        monkeypatch.setattr(manifest, "write", no_space)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpointer(folder, keep=1))
        stack.enter_context(full_disk(2000) if where == "data" else contextlib.nullcontext())
        checkpoints.check()
        checkpoints.save(state, 30)
        message = r"of step 30 cannot be written to .* \((File too|No sp)"
        with pytest.raises(InputError, match=message):
            until_it_raises(checkpoints.check)
    assert steps(folder) == [10, 20]
    assert newest_good(folder) == (20, {})


@pytest.mark.parametrize("error", [TimeoutError, ConnectionResetError])
def test_a_process_that_is_gone_is_not_told_as_a_full_disk(tmp_path, state, monkeypatch, error):
    def fails(*_, **__):
        raise error("nobody there")

    with Checkpointer(tmp_path, keep=1) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "save", fails)
        with pytest.raises(error, match="nobody there"):
            checkpoints.save(state, 1)


def test_an_error_while_closing_replaces_none_that_is_under_way(tmp_path, monkeypatch, capsys):
    def fails(self, close=ocp.CheckpointManager.close):
        close(self)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "close", fails)
    with pytest.raises(KeyError, match="first"), Checkpointer(tmp_path, keep=1):
        raise KeyError("first")
    assert "(No space left on device): make room" in capsys.readouterr().err
    with pytest.raises(InputError, match="No space left"), Checkpointer(tmp_path, keep=1):
        pass


def test_a_save_may_copy_where_the_loop_may_not(tmp_path, state, monkeypatch):
    def copies(*_, **__):
        return jnp.ones(3) + np.ones(3, np.float32)

    with Checkpointer(tmp_path, keep=1) as checkpoints, sharding.explicit_transfers():
        with pytest.raises(RuntimeError, match="Disallowed"):
            copies()
        monkeypatch.setattr(checkpoints._manager, "save", copies)
        checkpoints.save(state, 1)


def until_it_raises(check):
    for _ in range(600):
        check()
        time.sleep(0.1)
