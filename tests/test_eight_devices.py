"""On 8 host devices: loss and attention are one device's, and logits never travel."""

import json
import os
import re
import subprocess
import sys

from helpers import ROOT

V, D, CHUNK, DEVICES = 1096, 32, 64, 8  # V and its parts are the size of nothing else

# Run in a process of its own: the number of devices is fixed when a backend starts.
LOSS = """
import json, sys
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
sys.path.insert(0, sys.argv[1])
from opsdc_jax import losses, sharding
from opsdc_jax.divergences import choose
from helpers import relative_error

B, R, D = 8, 10, 24
rng = np.random.default_rng(0)

def inputs(V):
    hidden, heads = rng.normal(size=(2, B, R, D)), rng.normal(size=(2, V, D)) * 0.4
    arrays = [np.float32(part) for pair in zip(hidden, heads) for part in pair]
    return *arrays, rng.integers(0, V - 3, (B, R)), np.float32(-5 * rng.random((B, R))), (
        np.float32(rng.normal(size=(B, R)))
    ), rng.random((B, R)) < 0.7

def run(mesh, name, top_k, arrays):
    def loss(student, head, *rest):
        chosen = choose(name, top_k)
        sums = losses.divergence_sums(chosen, len(head) - 3, 24, mesh, student, head, *rest)
        return sums.divergence, sums
    gradients, sums = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(*arrays)
    return jax.device_get((sums, gradients))

errors = {}
for name, top_k, V, sizes in (
    ("reverse_kl", 0, 136, (1, 8, 1)),
    ("forward_kl", 0, 130, (1, 2, 4)),
    ("jsd", 0, 131, (2, 2, 2)),
    ("nll", 0, 130, (1, 4, 2)),
    ("reverse_kl", 7, 131, (2, 2, 2)),
):
    mesh = sharding.make_mesh(dict(zip(sharding.MESH_AXES, sizes)))
    arrays = inputs(V)
    rows, heads = sharding.batch_sharding(mesh), NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    placed = [jax.device_put(x, heads if x.shape[0] == V else rows) for x in arrays]
    sums, gradients = run(mesh, name, top_k, placed)
    expected, wanted = run(None, name, top_k, arrays)
    errors[f"{name} {top_k} {sizes}"] = [
        *(abs(a - b) / abs(b) for a, b in zip(sums, expected)),
        *map(relative_error, gradients, wanted),
    ]
print(json.dumps(errors, default=float))
"""

ATTENTION = """
import json, sys
import jax
import jax.numpy as jnp
import numpy as np
sys.path.insert(0, sys.argv[1])
from opsdc_jax import sharding
from opsdc_jax.models.attention import attention
from helpers import relative_error

rng = np.random.default_rng(0)
B, H, N, T, K = 4, 8, 4, 130, 16
arrays = [np.float32(rng.normal(size=(B, heads, T, K))) for heads in (H, N, N)]
valid = np.arange(T) >= np.arange(B)[:, None] * 9
direction = np.float32(rng.normal(size=(B, H, T, K))) * valid[:, None, :, None]

def gradients(implementation, mesh):
    def loss(*arrays):
        out = attention(*arrays, implementation=implementation, valid_BxT=valid, mesh=mesh)
        return jnp.sum(out * direction)
    return jax.device_get(jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*arrays))

training = sharding.make_mesh({"replica": 2, "fsdp": 2, "tensor": 2})
whole = sharding.make_mesh({"replica": 1, "fsdp": 4, "tensor": 2})
decoding = sharding.make_decode_mesh(whole, 8, N)  # each key/value head is held twice
expected = gradients("dense", None)
print(json.dumps([relative_error(gradients("splash", mesh), expected)
                  for mesh in (training, decoding)]))
"""

COLLECTIVES = """
import dataclasses, json, re, sys
import jax
sys.path.insert(0, sys.argv[1])
import test_memory, test_eight_devices as sizes
from helpers import SMALL
from opsdc_jax import sharding

model = dataclasses.replace(
    SMALL, vocab_size=sizes.V, hidden_size=sizes.D, num_hidden_layers=2, remat="full"
)
mesh = sharding.make_mesh({"replica": 1, "fsdp": 4, "tensor": 2})
jitted = test_memory.train_step(model, mesh, sizes.CHUNK)
rows = sharding.batch_sharding(mesh)
batch = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows),
    test_memory.abstract_batch(8, 8, 24),
)
arguments = test_memory.accumulate_arguments(jitted, batch)
print(json.dumps(jitted.accumulate.lower(*arguments).compile().as_text()))
"""


def on_devices(program):
    """What a program prints last, run on 8 host devices."""
    flags = f"--xla_force_host_platform_device_count={DEVICES}"
    command = [sys.executable, "-c", program, str(ROOT / "tests")]
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_loss_and_gradients_equal_one_devices():
    """On several meshes, also where they do not divide the vocabulary."""
    errors = on_devices(LOSS)
    assert len(errors) == 5
    for case, gaps in errors.items():
        assert max(gaps) <= 1e-5, case


def test_the_kernel_takes_rows_and_heads_of_either_mesh():
    """Emulated; in the layouts of training and of decoding, where two devices share a head."""
    assert max(on_devices(ATTENTION)) <= 2e-5


def test_logits_never_travel():
    """In the compiled train step: what is exchanged, and what each device forms, by shape."""
    text = on_devices(COLLECTIVES)
    collective = re.compile(
        r"= ([^=]*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
        r"(?:-start)?\("
    )
    exchanged = [
        (kind, tuple(map(int, shape.split(","))))
        for shapes, kind in collective.findall(text)
        for shape in re.findall(r"\[([\d,]+)\]", shapes)
    ]
    part = V // DEVICES
    assert f"f32[{CHUNK},{part}]" in text, "each device forms its own part of a chunk's logits"
    assert f"f32[{CHUNK},{V}]" not in text
    parts = {V // n for n in (1, 2, 4, 8)}
    along_vocabulary = [(kind, shape) for kind, shape in exchanged if parts & set(shape)]
    for kind, shape in along_vocabulary:
        # Heads and their gradients, in the parts of the 4 devices of fsdp: by all-to-all, or into
        # the layout that parameters have.
        assert len(shape) == 2, (kind, shape)
        assert shape[1] == D // 4, (kind, shape)
        assert kind == "all-to-all" or shape[0] == V, (kind, shape)
    assert along_vocabulary
    assert ("all-reduce", (CHUNK,)) in exchanged, "sums over the vocabulary are added up"
