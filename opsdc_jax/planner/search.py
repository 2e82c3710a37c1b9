"""The smallest slices and meshes that hold a configuration, found by compiling."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ml_collections import ConfigDict

from opsdc_jax.config import InputError
from opsdc_jax.planner import memory, plan, programs
from opsdc_jax.planner.memory import STATE
from opsdc_jax.planner.plan import Phase, Plan
from opsdc_jax.planner.topology import GIB, Topology

# Model parallelism costs communication in every layer: the least that fits is the best.
_TENSOR = (1, 2, 4, 8)
# The setting that bounds the rows in memory at a time, by phase; none changes a result.
ROWS = {
    "accumulate": "train.micro_batch_size",
    "rollout": "sampler.slots",
    "evaluate": "eval.batch_size",
}


def smallest(
    settings: ConfigDict,
    topologies: Iterable[Topology],
    report: Callable[[str], None] = lambda line: None,
) -> Plan | None:
    """The first plan that fits, of topologies in the order given; None if none does.

    On each, the meshes with the least model parallelism first, and only then the optimizer in host
    memory. Where a phase does not fit, fewer rows at a time are tried.

    Args:
      report: called with a line about each candidate.
    """
    for topology in topologies:
        for candidate, assumed in candidates(settings, topology):
            try:
                if could_fit(candidate, topology):
                    found = _with_fewer_rows(candidate, topology, assumed, report)
                    if found.fits:
                        return found
            except InputError as error:
                report(f"{topology.name} {_axes(candidate)}: {error}")
    return None


def candidates(
    settings: ConfigDict, topology: Topology
) -> Iterator[tuple[ConfigDict, dict[str, Any]]]:
    """Configurations to try on a topology, with the settings that they assume."""
    for assumed in ({}, {"optim.offload": True}):
        for tensor in _TENSOR:
            if topology.devices % tensor == 0:
                candidate = _changed(settings, assumed)
                candidate.mesh.replica = 1
                candidate.mesh.fsdp, candidate.mesh.tensor = topology.devices // tensor, tensor
                yield candidate, assumed


def _with_fewer_rows(
    settings: ConfigDict,
    topology: Topology,
    assumed: dict[str, Any],
    report: Callable[[str], None],
) -> Plan:
    """The plan with as few rows at a time as it takes, or the last one tried."""
    while True:
        overrides = [f"--config.{key}={value}" for key, value in assumed.items()]
        found = plan.make_plan(_changed(settings, assumed), topology, assumed=overrides, early=True)
        last = next(
            (phase for phase in found.phases if phase.excess(topology) > 0), found.phases[-1]
        )
        report(
            f"{topology.name} {_axes(settings)} {' '.join(found.assumed)}: {last.name} "
            + (f"{last.peak / GIB:.2f} GiB" if last.peak else f"does not compile: {last.error}")
        )
        fewer = fewer_rows(last, found, _changed(settings, assumed))
        if found.fits or not fewer:
            return found
        assumed = assumed | {ROWS[last.name]: fewer}


def _changed(settings: ConfigDict, values: dict[str, Any]) -> ConfigDict:
    """A copy with other values of some dotted keys."""
    copy = settings.copy_and_resolve_references()
    for key, value in values.items():
        section, _, name = key.partition(".")
        copy[section][name] = value
    return copy


def fewer_rows(phase: Phase, found: Plan, settings: ConfigDict) -> int:
    """What to lower the phase's rows at a time to, see `ROWS`; 0 where that would not help.

    A micro-batch goes down to one row on each part of the mesh; rows to sample to the power of two
    that fits, by proportion.
    """
    if phase.program is None or phase.name not in ROWS:
        return 0
    if phase.name == "accumulate":
        fewest = found.mesh["replica"] * found.mesh["fsdp"]
        return fewest if fewest < settings.train.micro_batch_size else 0
    rows = programs.rows(phase.name, programs.values(settings))
    # What fewer rows leave of the program: decoding's weights, and the state that it takes.
    state = sum(found.parts[name] for name in STATE) - phase.resident
    fixed = state + found.parts.get("decode_weights", 0)
    room = max(found.topology.budget_bytes - phase.resident - fixed, 0)
    fewer = min(int(rows * room / max(phase.program - fixed, 1)), rows - 1)
    return 2 ** (fewer.bit_length() - 1) if fewer else 0


def could_fit(settings: ConfigDict, topology: Topology) -> bool:
    """Whether, by arithmetic, the state fits beside a step's gradients and a micro-batch's."""
    model, vocabulary = plan.architecture(settings)
    sizes = plan.mesh_sizes(settings, topology)
    spec = programs.make_spec(settings, model, vocabulary, sizes)
    like = programs.train_step(spec, memory.abstract_mesh(sizes)).like
    parts = memory.state_parts(like)
    return sum(parts.values()) + 2 * parts["weights"] <= topology.budget_bytes


def _axes(settings: ConfigDict) -> str:
    return f"fsdp={settings.mesh.fsdp} tensor={settings.mesh.tensor}"
