"""A saved train state comes back bit for bit."""

import types

import jax
import jax.numpy as jnp
import pytest
from helpers import SMALL, random_params

from opsdc_jax import distill
from opsdc_jax.checkpoint import Checkpointer
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
        assert checkpoints.latest_step() is None
        checkpoints.save(state, 3)
    with Checkpointer(tmp_path / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.latest_step() == 3
        blank = jax.tree.map(jnp.zeros_like, state)
        assert same(checkpoints.restore(3, like=blank), state)


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
