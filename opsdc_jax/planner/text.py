"""Plans as text and as JSON values."""

from collections.abc import Sequence
from typing import Any

from opsdc_jax.planner.plan import Phase, Plan
from opsdc_jax.planner.topology import GIB, MARGIN

_PARTS = {
    "weights": "student, float32 masters",
    "teacher": "second copy of the weights; with an anchor, the base too",
    "optimizer": "AdamW's moments",
    "gradients": "accumulated over micro-batches",
    "activations": "temporaries of one micro-batch, logits included",
    "decode_weights": "student in compute dtype, laid out for decoding",
    "kv_cache": "keys and values of the rollout",
    "prompts": "keys and values of the prompts that are next in line",
}

_HOST = (
    "  (compiled for the host platform, with attention block by block and 16-bit products in "
    "float32: an estimate)"
)
_COLUMNS = (
    "config",
    "slice",
    "mesh",
    "resident",
    "accumulate",
    "apply",
    "rollout (cache)",
    "evaluate",
    "of",
    "step, s",
    "assumed",
)
_HEAD = f"""\
# What fits where

Written by `python scripts/plan.py --table > docs/hardware.md`: do not edit it by hand.

For each configuration as it stands in configs/ (32 rollouts of 1,024 + 8,192 tokens, float32
masters and moments, bf16 teacher, evaluation with 30,000 tokens) the smallest slice of each family
that holds it, and the mesh with the least model parallelism on it; AdamW's moments lie in host
memory only where no mesh holds them. Found by compiling the real programs for the slice with
libtpu: it proves that they compile, how they are sharded and what memory they use. None of it has
run on a TPU. One row again, in full:

    python scripts/plan.py --config configs/qwen3_8b.py --topology v5e:4x4 \\
        --config.optim.offload=True --config.train.micro_batch_size=16

Figures are GiB on each device. Resident are weights + teacher + optimizer; the peak of each phase
holds them too. In brackets: the KV cache of a rollout. A device offers its memory less
{100 * MARGIN:.0f}%: the compiler's reports, made at low effort, read up to 3% below those of a full
compilation. Step: the least seconds of an optimizer step whose rollouts all use their budget, at
the peak FLOPs and memory bandwidth of the device, without communication; a bound, not a forecast.
Assumed: what to pass to the run (`--config.KEY=VALUE`) besides the mesh.
Not counted, of sampling in segments: the weights' way into decoding's layout (a layer at a time,
before there is a cache), a refill (works on one row), another size of the cache (one layer twice),
and, where every rollout has a slot, the prefill (beside the smallest cache).

| {" | ".join(_COLUMNS)} |
|{"---|" * len(_COLUMNS)}"""


def as_text(plan: Plan, changes: Sequence[str]) -> str:
    """The whole plan, for people."""
    axes = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    topology = plan.topology
    lines = [
        f"{plan.model}: {plan.parameters / 1e9:.2f} B parameters on {topology.name}, "
        f"{topology.devices} devices of {topology.device.hbm_gib:.2f} GiB; mesh {axes}",
        *(f"assumed {override}" for override in plan.assumed),
        "",
        "GiB on each device",
        *(f"  {name:15}{size / GIB:8.2f}  {_PARTS[name]}" for name, size in plan.parts.items()),
        "",
        f"  {'phase':12}{'program':>9}{'beside it':>11}{'peak':>8}"
        f"{'TFLOP':>10}{'GB moved':>10}{'least s':>9}{'runs':>7}",
        *map(_phase_line, plan.phases),
        *(f"  {phase.name}: {phase.error}" for phase in plan.phases if phase.error),
        "",
        "collectives of one run, on each device (of segments: once the weights are laid out)",
        *(f"  {phase.name:12}{_collectives(phase)}" for phase in plan.phases),
        "",
        verdict(plan),
        *([_HOST] if topology.platform != "tpu" else []),
        *(f"  would help: {change}" for change in changes),
    ]
    if changes:
        lines.append("  (estimates: plan again with the change)")
    if plan.step_seconds is not None and plan.fits:
        lines.append(bound(plan))
    return "\n".join(lines)


def verdict(plan: Plan) -> str:
    """One sentence: does it fit, and by how much."""
    budget, margin = plan.topology.budget_bytes / GIB, f"{100 * MARGIN:.0f}%"
    if plan.peak is None:
        return "does not compile"
    peak = plan.peak / GIB
    limit = f"{budget:.2f} GiB ({plan.topology.device.hbm_gib:.2f} less {margin} of margin)"
    if plan.fits:
        return f"fits: {peak:.2f} GiB at the peak, of {limit}"
    return f"does not fit: {peak:.2f} GiB at the peak, {peak - budget:.2f} more than {limit}"


def bound(plan: Plan) -> str:
    """The roofline of a step: what no run can beat."""
    assert plan.step_seconds is not None
    return (
        f"bound: a step of {plan.tokens:,} response tokens takes at least "
        f"{plan.step_seconds:.1f} s, {plan.tokens / plan.step_seconds:,.0f} tokens/s at most (peak "
        "FLOPs and bandwidth, no communication; a bound, not a forecast)"
    )


def _phase_line(phase: Phase) -> str:
    program = "-" if phase.program is None else f"{phase.program / GIB:.2f}"
    peak = "-" if phase.peak is None else f"{phase.peak / GIB:.2f}"
    seconds = "-" if phase.seconds is None else f"{phase.seconds:.3f}"
    return (
        f"  {phase.name:12}{program:>9}{phase.resident / GIB:11.2f}{peak:>8}"
        f"{phase.flops / 1e12:10.2f}{phase.moved / 1e9:10.1f}{seconds:>9}{phase.runs:7.3g}"
    )


def _collectives(phase: Phase) -> str:
    found = [
        f"{values['count']} {kind} ({values['bytes'] / GIB:.2f} GiB)"
        for kind, values in sorted(phase.collectives.items())
    ]
    return ", ".join(found) or "none"


def as_json(plan: Plan, changes: Sequence[str]) -> dict[str, Any]:
    """The whole plan as plain values; bytes are per device."""
    return {
        "model": plan.model,
        "parameters": plan.parameters,
        "topology": plan.topology.name,
        "devices": plan.topology.devices,
        "mesh": dict(plan.mesh),
        "assumed": list(plan.assumed),
        "fits": plan.fits,
        "peak_bytes": plan.peak,
        "hbm_bytes": plan.topology.hbm_bytes,
        "budget_bytes": plan.topology.budget_bytes,
        "parts": dict(plan.parts),
        "phases": [
            {
                "name": phase.name,
                "program_bytes": phase.program,
                "resident_bytes": phase.resident,
                "peak_bytes": phase.peak,
                "runs_per_step": phase.runs,
                "flops": phase.flops,
                "moved_bytes": phase.moved,
                "bound_seconds": phase.seconds,
                "collectives": phase.collectives,
                "error": phase.error,
            }
            for phase in plan.phases
        ],
        "bound_step_seconds": plan.step_seconds,
        "bound_tokens_per_second": plan.step_seconds and plan.tokens / plan.step_seconds,
        "changes": list(changes),
        "compile_seconds": plan.compile_seconds,
    }


def document(rows: Sequence[tuple[str, Plan]]) -> str:
    """docs/hardware.md: a row for each configuration and family of devices."""
    return "\n".join([_HEAD, *(_row(name, plan) for name, plan in rows)])


def _row(name: str, plan: Plan) -> str:
    axes = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "one"
    parts = {name: f"{size / GIB:.2f}" for name, size in plan.parts.items()}
    resident = f"{parts['weights']} + {parts['teacher']} + {parts['optimizer']}"
    peaks = {phase.name: f"{(phase.peak or 0) / GIB:.2f}" for phase in plan.phases}
    assumed = ", ".join(f"`{override.removeprefix('--config.')}`" for override in plan.assumed)
    step = "" if plan.step_seconds is None else f"{plan.step_seconds:.0f}"
    cells = [
        f"[{name}](../configs/{name})",
        f"{plan.topology.name}",
        axes,
        resident,
        peaks["accumulate"],
        peaks["apply"],
        f"{peaks['rollout']} ({parts['kv_cache']})",
        peaks.get("evaluate", ""),
        f"{plan.topology.budget_bytes / GIB:.2f}",
        step,
        assumed,
    ]
    return f"| {' | '.join(cells)} |"
