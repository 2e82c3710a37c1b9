"""Operations and bytes of a traced program, and the least time a device could take for them.

Counted on the jaxpr, where loops still have lengths: the compiler's own cost analysis counts the
body of a scan once and knows nothing of kernels.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr

from opsdc_jax.planner.topology import Device


class Cost(NamedTuple):
    """Work over all devices together.

    Attributes:
      flops: of matrix products, two for each multiply-add.
      bytes: operands read and results written by them, each once.
    """

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Any) -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, factor: float) -> "Cost":
        return Cost(self.flops * factor, self.bytes * factor)


def count(jaxpr: ClosedJaxpr | Jaxpr, steps: int = 1) -> Cost:
    """The matrix products of a program.

    A scan's body counts as often as it runs, a branch by its most expensive side, a `shard_map`
    once a device, an attention kernel by its body and grid (`_kernel`).

    Args:
      steps: how often the body of a `while` runs, whose length a jaxpr does not know.
    """
    total = Cost()
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            total += _product(eqn)
        elif name == "cond":
            total += max(count(branch, steps) for branch in eqn.params["branches"])
        elif name == "while":
            total += count(eqn.params["body_jaxpr"], steps).times(steps)
        elif name == "pallas_call":
            total += _kernel(eqn)
        else:
            inside = sum((count(inner, steps) for inner in _inner(eqn.params)), Cost())
            total += inside.times(_repeats(name, eqn.params))
    return total


def _repeats(name: str, params: dict[str, Any]) -> int:
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return 1


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """Jaxprs among an equation's parameters."""
    for key, value in params.items():
        # The rules of a custom derivative stand beside its function; they run where they are used.
        if isinstance(value, ClosedJaxpr | Jaxpr) and key not in ("fwd_jaxpr", "jvp_jaxpr"):
            yield value


def _product(eqn: Any) -> Cost:
    left, right, out = (*(v.aval for v in eqn.invars), eqn.outvars[0].aval)
    (contracted, _), _ = eqn.params["dimension_numbers"]
    depth = math.prod(left.shape[axis] for axis in contracted)
    moved = sum(math.prod(a.shape) * a.dtype.itemsize for a in (left, right, out))
    return Cost(2.0 * math.prod(out.shape) * depth, float(moved))


def _kernel(eqn: Any) -> Cost:
    """A causal attention kernel: half of its grid's blocks are above the diagonal and skipped."""
    grid = math.prod(size for size in eqn.params["grid_mapping"].grid if isinstance(size, int))
    body = count(eqn.params["jaxpr"])
    moved = sum(
        math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in (*eqn.invars, *eqn.outvars)
    )
    return Cost(body.flops * grid / 2, float(moved))


def seconds(flops: float, moved: float, device: Device) -> float | None:
    """The roofline of one device: the longer of computing and of moving; None where unknown.

    Args:
      flops, moved: operations and bytes of memory traffic on that device.
    """
    if device.tflops is None or device.gb_s is None:
        return None
    return max(flops / (device.tflops * 1e12), moved / (device.gb_s * 1e9))
