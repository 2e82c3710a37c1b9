"""Four host devices give what one gives, hold a part each, and compile each shape once."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT

# Run in a process of its own: the number of devices is fixed when a backend starts.
STEPS = """
import dataclasses, json, sys
import jax
sys.path.insert(0, sys.argv[1])
import test_distill
from helpers import SMALL, random_params
from opsdc_jax import distill, sharding
from opsdc_jax.metrics import CompileCounter
from opsdc_jax.models import qwen3

mesh = sharding.make_mesh({"replica": 1, "fsdp": int(sys.argv[2]), "tensor": int(sys.argv[3])})
jitted = distill.make_train_step(
    SMALL,
    distill.make_optimizer(test_distill.OPTIM),
    divergence="reverse_kl",
    chunk_tokens=16,
    vocab_size=test_distill.ENTRIES,
    shardings=qwen3.shardings(SMALL, mesh),
    teacher_dtype="float32",
)
state = jitted.init(jax.device_put(random_params(SMALL, 0), qwen3.shardings(SMALL, mesh)))
batches = list(test_distill.cut(test_distill.random_batch(), 4))
counter, losses, compiled = CompileCounter(), [], []
for _ in range(3):
    accumulator = jitted.zeros(state.student)
    for batch in batches:
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
        accumulator = jitted.accumulate(state.student, state.teacher, accumulator, batch)
    state, metrics = jitted.apply(state, accumulator)
    losses.append(float(metrics["loss"]))
    compiled.append(counter.count)
    teacher = jitted.refresh(state.student, state.teacher) if len(losses) == 2 else state.teacher
    state = dataclasses.replace(state, teacher=teacher)
moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim > 2]
parts = {leaf.size // leaf.addressable_shards[0].data.size for leaf in moments}
print(json.dumps({"losses": losses, "compiled": compiled, "parts": sorted(parts)}))
"""


def steps(fsdp, tensor):
    """Three steps on fsdp x tensor host devices."""
    flags = f"--xla_force_host_platform_device_count={fsdp * tensor}"
    command = [sys.executable, "-c", STEPS, str(ROOT / "tests"), str(fsdp), str(tensor)]
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_four_devices_are_one():
    one, four = steps(1, 1), steps(2, 2)
    assert four["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert one["parts"] == [1]
    assert four["parts"] == [4], "AdamW's moments are split as the parameters are"
    for run in (one, four):
        assert run["losses"][2] < run["losses"][0]
        assert run["compiled"][0] == run["compiled"][1], "the second step compiles nothing"
