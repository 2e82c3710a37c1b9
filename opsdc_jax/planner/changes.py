"""What would make a plan fit: estimates by proportion, to be confirmed by planning again."""

import math
from collections.abc import Iterator

from ml_collections import ConfigDict

from opsdc_jax.planner import topology
from opsdc_jax.planner.memory import STATE
from opsdc_jax.planner.plan import Phase, Plan
from opsdc_jax.planner.search import ROWS, fewer_rows
from opsdc_jax.planner.topology import GIB, Topology


def changes(plan: Plan, settings: ConfigDict) -> list[str]:
    """Sentences, the least intrusive change first; none where the plan fits.

    Args:
      settings: the configuration that was planned.
    """
    if plan.fits:
        return []
    over = [phase for phase in plan.phases if phase.peak is None or phase.excess(plan.topology) > 0]
    found = [line for phase in over for line in _for_phase(phase, plan, settings)]
    return [*dict.fromkeys(found), *_for_state(plan), *_bigger_slice(plan)]


def _for_phase(phase: Phase, plan: Plan, settings: ConfigDict) -> Iterator[str]:
    """Changes that lower one phase's own memory."""
    if phase.program is None:
        return
    fewer = fewer_rows(phase, plan, settings)
    if fewer:
        yield f"--config.{ROWS[phase.name]}={fewer}: fewer rows in memory at a time ({phase.name})"
    if phase.name == "accumulate":
        wider = plan.mesh["tensor"] * 2
        if plan.mesh["fsdp"] % 2 == 0 and wider <= 8:
            yield (
                f"--mesh fsdp={plan.mesh['fsdp'] // 2},tensor={wider}: each row's activations over "
                "twice the devices"
            )


def _for_state(plan: Plan) -> Iterator[str]:
    """Changes to what stays resident."""
    state = sum(plan.parts[name] for name in STATE)
    if state > plan.topology.budget_bytes:
        least = math.ceil(state * plan.topology.devices / plan.topology.budget_bytes)
        yield (
            f"{least} devices or more: the train state alone takes {state / GIB:.2f} GiB on each "
            f"of {plan.topology.devices}"
        )
    moments = plan.parts["optimizer"]
    if moments > 2**20:  # else only counters are left on the device
        yield (
            f"--config.optim.offload=True: AdamW's moments in host memory, {moments / GIB:.2f} GiB "
            "less on each device"
        )


def _bigger_slice(plan: Plan) -> Iterator[str]:
    """The smallest slice of the family whose share of what is split would fit."""
    if plan.peak is None or plan.topology.platform == "cpu":
        return
    family = plan.topology.family
    name = family if family in topology.TPUS else f"gpu:{family}"
    for larger in topology.slices(name):
        if larger.devices > plan.topology.devices and _scaled(plan, larger) <= larger.budget_bytes:
            yield f"--topology {larger.name}: more devices to split over"
            return


def _scaled(plan: Plan, larger: Topology) -> float:
    assert plan.peak is not None
    return plan.peak * plan.topology.devices / larger.devices
