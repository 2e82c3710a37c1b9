"""Slices and boxes by name: how many devices, how much memory, and their published peaks.

Memory of TPU devices is what libtpu 0.0.52 lets a program use, peaks are those of the vendors' data
sheets: dense bf16 without sparsity, and HBM bandwidth.
"""

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from opsdc_jax.config import InputError

GIB = 2**30
# Reports read up to 3% low against default compiler flags: what a plan calls fitting leaves this.
MARGIN = 0.05


MOST_DEVICES = 16_384  # more than any slice or cluster that one program runs on


class Device(NamedTuple):
    """One device of a mesh; where a chip holds two devices, its figures are halved.

    Attributes:
      hbm_gib: memory a program may use, GiB.
      tflops: peak of dense bf16 products, 1e12 per second; None where unknown.
      gb_s: memory bandwidth, 1e9 bytes per second; None where unknown.
    """

    hbm_gib: float
    tflops: float | None
    gb_s: float | None


class Family(NamedTuple):
    """A TPU generation: its device, devices a chip, and the slices a search goes through."""

    device: Device
    per_chip: int
    slices: tuple[str, ...]


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8")
TPUS: Mapping[str, Family] = {
    "v5e": Family(Device(15.75, 197, 819), 1, _FLAT),
    "v6e": Family(Device(31.24, 918, 1640), 1, _FLAT),
    "v5p": Family(Device(95.73, 459, 2765), 1, _CUBES),
    "tpu7x": Family(Device(94.74, 1153.5, 3690), 2, _CUBES),
    "v4": Family(Device(15.25, 137.5, 614), 2, _CUBES),
}
# Set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95: by default JAX takes three quarters of a GPU's memory.
GPUS: Mapping[str, Device] = {
    "A100": Device(79.2, 312, 2039),
    "H100": Device(79.2, 989, 3350),
    "H200": Device(139.8, 989, 4800),
    "B200": Device(178.3, 2250, 7700),
}
_GPU_COUNTS = (1, 2, 4, 8, 16, 32)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind.

    Attributes:
      name: as given, such as "v5e:4x4", "gpu:8xH200" or "cpu:8".
      platform: "tpu", "gpu" or "cpu".
      family: what the devices are: "v5e", "H200", "cpu".
      devices: their number.
    """

    name: str
    platform: str
    family: str
    devices: int
    device: Device

    @property
    def hbm_bytes(self) -> int:
        return int(self.device.hbm_gib * GIB)

    @property
    def budget_bytes(self) -> int:
        """What a plan may use of a device's memory."""
        return int(self.hbm_bytes * (1 - MARGIN))


def parse(name: str) -> Topology:
    """The devices a name stands for, at most `MOST_DEVICES`.

    Args:
      name: "v5e:4x4" (also v6e; v5p, tpu7x and v4 with three sizes), "gpu:8xH200", or "cpu:8": this
        machine's memory in so many parts.

    Raises:
      InputError: no such device, not such a form, or too many.
    """
    topology = _parse(name)
    if topology.devices > MOST_DEVICES:
        raise InputError(
            f"topology {name!r} has {topology.devices:,} devices, planned are at most "
            f"{MOST_DEVICES:,}: give a smaller one"
        )
    return topology


def _parse(name: str) -> Topology:
    family, _, shape = name.partition(":")
    if family in TPUS:
        return _tpu(name, family, shape)
    if family == "gpu":
        given = re.fullmatch(r"(\d+)x(\w+)", shape)
        if given is None or not int(given[1]) or given[2].upper() not in GPUS:
            raise InputError(
                f"topology {name!r}: write gpu:COUNTxKIND, KIND one of {', '.join(GPUS)}"
            )
        kind = given[2].upper()
        return Topology(name, "gpu", kind, int(given[1]), GPUS[kind])
    if family == "cpu":
        if not shape.isdecimal() or not int(shape):
            raise InputError(f"topology {name!r}: write cpu:COUNT, the number of host devices")
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        device = Device(pages * size / GIB / int(shape), None, None)
        return Topology(name, "cpu", "cpu", int(shape), device)
    raise InputError(
        f"topology {name!r} is not known: write for instance v5e:4x4, v5p:2x2x2, gpu:8xH200 or "
        f"cpu:8 (families: {', '.join([*TPUS, 'gpu', 'cpu'])})"
    )


def _tpu(name: str, family: str, shape: str) -> Topology:
    sizes = shape.split("x")
    wanted = len(TPUS[family].slices[0].split("x"))
    if len(sizes) != wanted or not all(size.isdecimal() and int(size) for size in sizes):
        raise InputError(
            f"topology {name!r}: a {family} slice is written with {wanted} sizes, for instance "
            f"{family}:{TPUS[family].slices[2]}"
        )
    devices = math.prod(map(int, sizes)) * TPUS[family].per_chip
    return Topology(name, "tpu", family, devices, TPUS[family].device)


def slices(family: str) -> Iterator[Topology]:
    """The topologies a search goes through, smallest first.

    Args:
      family: "v5e" and so on, or "gpu:H200".

    Raises:
      InputError: no such family.
    """
    kind = family.removeprefix("gpu:").upper()
    if family in TPUS:
        yield from (parse(f"{family}:{shape}") for shape in TPUS[family].slices)
    elif family.startswith("gpu:") and kind in GPUS:
        yield from (parse(f"gpu:{count}x{kind}") for count in _GPU_COUNTS)
    else:
        raise InputError(
            f"--search goes through the slices of a family, not of {family!r}: choose from "
            f"{', '.join([*TPUS, *(f'gpu:{kind}' for kind in GPUS)])}"
        )
