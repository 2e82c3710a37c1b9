"""The meshes and the two tables of rules; several devices are pretended where shapes matter."""

import types

import jax
import numpy as np
import pytest
from helpers import SMALL
from jax.sharding import AbstractMesh, PartitionSpec

from opsdc_jax import sharding
from opsdc_jax.config import InputError
from opsdc_jax.models import hf, qwen3
from opsdc_jax.tiny import BASE_FOLDER

AXES, SHAPES = qwen3.logical_axes(SMALL), qwen3.abstract_params(SMALL)


def mesh(replica=1, fsdp=1, tensor=1):
    return AbstractMesh((replica, fsdp, tensor), sharding.MESH_AXES)


def test_the_rest_of_the_devices_goes_to_minus_one():
    made = sharding.make_mesh({"replica": 1, "fsdp": -1, "tensor": 1})
    assert dict(made.shape) == {"replica": 1, "fsdp": jax.device_count(), "tensor": 1}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"replica": 1, "fsdp": 64, "tensor": 1}, "fsdp=64.*does not multiply"),
        ({"replica": -1, "fsdp": -1, "tensor": 1}, "at most one may be -1"),
        ({"replica": 1, "fsdp": 0, "tensor": 1}, "must be positive"),
    ],
)
def test_bad_meshes_are_refused(sizes, message):
    with pytest.raises(InputError, match=message):
        sharding.make_mesh(sizes)


def test_parameters_follow_the_table():
    specs = jax.tree.map(
        lambda placed: placed.spec, sharding.param_shardings(mesh(1, 4, 2), AXES, SHAPES)
    )
    layers = specs["layers"]
    assert specs["embedding"] == PartitionSpec(None, "fsdp")
    assert layers["attention"]["query"] == PartitionSpec(None, "fsdp", "tensor", None)
    assert layers["attention"]["out"] == PartitionSpec(None, "tensor", None, "fsdp")
    assert layers["mlp"]["down"] == PartitionSpec(None, "tensor", "fsdp")
    assert layers["mlp_norm"]["scale"] == PartitionSpec(None, "fsdp")


def test_an_indivisible_axis_is_refused_with_the_sizes_that_work():
    with pytest.raises(InputError, match=r"key.*'kv_heads' of size 2.*tensor=4.*work: \[1, 2\]"):
        sharding.param_shardings(mesh(tensor=4), AXES, SHAPES)


def test_the_tiny_model_on_tensor_4_is_refused_with_the_sizes_that_work():
    tiny = hf.load_config(BASE_FOLDER)
    with pytest.raises(InputError, match=r"'kv_heads' of size 2.*tensor=4.*work: \[1, 2\]"):
        qwen3.shardings(tiny, mesh(fsdp=2, tensor=4))


def decoding(monkeypatch, fsdp, tensor, width):
    """Sizes of a decode mesh of pretended devices, for a model of 8 key/value heads."""
    # A Mesh takes real devices only: how many there are of them on each axis is all that matters.
    axes = lambda devices, names, **_: dict(zip(names, devices.shape, strict=True))  # noqa: E731
    monkeypatch.setattr(sharding, "Mesh", axes)
    devices, shape = np.arange(fsdp * tensor).reshape(1, fsdp, tensor), mesh(1, fsdp, tensor).shape
    return sharding.make_decode_mesh(types.SimpleNamespace(devices=devices, shape=shape), width, 8)


@pytest.mark.parametrize(
    ("fsdp", "tensor", "width", "expected"),
    [
        (16, 1, 8, (1, 2, 8, 1, 1)),
        (8, 2, 2, (1, 8, 1, 1, 2)),
        (8, 2, 8, (1, 2, 4, 1, 2)),
        (16, 1, 16, (1, 1, 8, 2, 1)),  # beyond the 8 key/value heads: two copies of each
        (4, 4, 16, (1, 1, 2, 2, 4)),
    ],
)
def test_decoding_cuts_the_fsdp_axis_in_three(monkeypatch, fsdp, tensor, width, expected):
    made = decoding(monkeypatch, fsdp, tensor, width)
    assert made == dict(zip(sharding.DECODE_AXES, expected, strict=True))


@pytest.mark.parametrize(
    ("fsdp", "tensor", "width", "works"),
    [
        (8, 2, 1, "2, 4, 8, 16"),
        (8, 1, 3, "1, 2, 4, 8"),
        (12, 1, 12, "1, 2, 4"),
        (4, 2, 0, "2, 4, 8"),
    ],
)
def test_widths_that_cannot_be_cut_are_refused_with_those_that_can(
    monkeypatch, fsdp, tensor, width, works
):
    with pytest.raises(InputError, match=rf"decode_tensor={width} .*work: \[{works}\]"):
        decoding(monkeypatch, fsdp, tensor, width)


def test_colliding_axes_are_refused():
    shape = {"w": jax.ShapeDtypeStruct((8, 8), "float32")}
    with pytest.raises(InputError, match="collide"):
        sharding.param_shardings(mesh(fsdp=2), {"w": ("embed", "embed")}, shape)


def test_batches_must_split_over_the_batch_axes():
    sharding.check_divides(mesh(replica=2, fsdp=4), "train.batch_size", 32)
    with pytest.raises(InputError, match=r"train.batch_size=12 cannot be split over 8"):
        sharding.check_divides(mesh(replica=2, fsdp=4), "train.batch_size", 12)
