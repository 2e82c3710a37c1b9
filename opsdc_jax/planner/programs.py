"""The jitted programs of a run as the planner compiles them, each in a process of its own.

    python -m opsdc_jax.planner.programs FOLDER < spec.json

compiles one program and leaves in FOLDER what it found: traced.json (operation counts), the
compiler's own dump (memory report, optimised HLO), and error.txt where the compiler refused. The
parent (planner.verdicts) reads what it needs and ends this process: code generation, which takes
most of a compilation, decides nothing about memory.

A spec is a dictionary of plain values: see `make_spec`.
"""

import dataclasses
import functools
import json
import os
import pathlib
import sys
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from ml_collections import ConfigDict

from opsdc_jax import continuous, distill, prefill, rollout, sampler, sampling, sharding, slots
from opsdc_jax.config import get
from opsdc_jax.models import decode, qwen3
from opsdc_jax.models.layers import Qwen3Config
from opsdc_jax.models.rope import Yarn
from opsdc_jax.planner import memory, roofline
from opsdc_jax.planner.topology import Topology, parse

_INSTRUCTION = 64  # tokens that the teacher's prompt is longer; the paper's v1 adds about 40
_WIDTHS = ("sampler.max_prompt_tokens", "sampler.max_response_tokens")
_OPTIM = ("lr", "warmup_steps", "b1", "b2", "weight_decay", "clip_norm", "offload")
# The configuration keys that change a program, by its name; in the order of a plan.
KEYS: Mapping[str, tuple[str, ...]] = {
    "accumulate": (
        *_WIDTHS,
        "train.micro_batch_size",
        "loss.divergence",
        "loss.top_k",
        "loss.anchor",
        "loss.chunk_tokens",
        "model.teacher_dtype",
    ),
    "apply": (*(f"optim.{key}" for key in _OPTIM), "model.teacher_dtype", "loss.anchor"),
    "refresh": ("model.teacher_dtype", "teacher.decay"),
    "rollout": (*_WIDTHS, "train.batch_size", "sampler.slots", "mesh.decode_tensor"),
    "evaluate": (
        "sampler.max_prompt_tokens",
        "eval.max_response_tokens",
        "eval.batch_size",
        "mesh.decode_tensor",
    ),
}
_COMPILER_OPTIONS = {
    "tpu": {
        "exec_time_optimization_effort": -1.0,
        "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
    },
}


class Program(NamedTuple):
    """One program, ready to be traced.

    Attributes:
      jitted: the function of the run.
      args, static: its arguments as placed shapes, and its static keyword arguments.
      state: the arguments that are part of the train state.
      parts: bytes per device of what a plan names (`text`), by name.
      steps: how often the body of a loop of unknown length runs (decoded tokens).
    """

    jitted: Any
    args: tuple[Any, ...]
    static: Mapping[str, Any] = {}
    state: tuple[Any, ...] = ()
    parts: Mapping[str, int] = {}
    steps: int = 1


def make_spec(
    settings: ConfigDict, model: Qwen3Config, vocab_size: int, sizes: Mapping[str, int]
) -> dict[str, Any]:
    """All that decides what the programs are: plain values that travel as JSON.

    Args:
      vocab_size: the tokenizer's entries.
      sizes: of each mesh axis, all positive.
    """
    return {
        "model": dataclasses.asdict(model),
        "vocab_size": vocab_size,
        "mesh": dict(sizes),
        "settings": values(settings),
    }


def train_step(spec: Mapping[str, Any], mesh: Any) -> distill.TrainStep:
    """The run's train step on a mesh; an abstract one is enough to know its shapes."""
    model, settings = _model(spec), spec["settings"]
    optim = {key.removeprefix("optim."): value for key, value in settings.items() if "optim" in key}
    return distill.make_train_step(
        model,
        distill.make_optimizer(ConfigDict(optim)),
        divergence=settings["loss.divergence"],
        chunk_tokens=settings["loss.chunk_tokens"],
        vocab_size=spec["vocab_size"],
        shardings=qwen3.shardings(model, mesh),
        teacher_dtype=settings["model.teacher_dtype"],
        top_k=settings["loss.top_k"],
        teacher_decay=settings["teacher.decay"],
        anchor=settings["loss.anchor"],
        offload_optimizer=settings["optim.offload"],
    )


def build(name: str, spec: Mapping[str, Any], mesh: Mesh) -> Program:
    """A program of `KEYS` with the arguments it gets in the run, at their largest."""
    settings, step = spec["settings"], train_step(spec, mesh)
    like = step.like
    if name in ("rollout", "evaluate"):
        section = "sampler" if name == "rollout" else "eval"
        width = settings[f"{section}.max_response_tokens"]
        B, batch = rows(name, settings), settings["train.batch_size"]
        widths = settings["sampler.max_prompt_tokens"], width
        if name == "rollout" and not continuous.worthwhile(B, batch, *widths):
            return _generate(spec, mesh, like, B, width)
        refilled = name == "evaluate" or continuous.refilled(settings["sampler.slots"], batch)
        return _segment(spec, mesh, like, B, width, refilled)
    if name == "refresh":
        both = (like.student, like.teacher)
        return Program(step.refresh, both, state=both)
    accumulator = jax.eval_shape(step.zeros, like.student)
    if name == "apply":
        return Program(step.apply, (like, accumulator), state=(like,))
    return Program(
        step.accumulate,
        (like.student, like.teacher, accumulator, _batch(settings, mesh), like.base),
        state=(like.student, like.teacher, like.base),
        parts={"gradients": memory.device_bytes(accumulator)},
    )


def values(settings: ConfigDict) -> dict[str, Any]:
    """The settings that decide what the programs are, by dotted key."""
    return {key: get(settings, key) for keys in KEYS.values() for key in keys}


def rows(name: str, settings: Mapping[str, Any]) -> int:
    """Rows that decode at a time, in "rollout" or "evaluate"."""
    if name == "evaluate":
        return settings["eval.batch_size"]
    batch = settings["train.batch_size"]
    return min(settings["sampler.slots"] or batch, batch)


def _model(spec: Mapping[str, Any]) -> Qwen3Config:
    fields = dict(spec["model"])
    yarn = fields.pop("yarn")
    return Qwen3Config(**fields, yarn=Yarn(**yarn) if yarn else None)


def _rows(mesh: Mesh, dtype: Any, *shape: int) -> Any:
    """Stands for an array whose rows are split over the mesh."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))


def _batch(settings: Mapping[str, Any], mesh: Mesh) -> rollout.DistillBatch:
    """A micro-batch as the run cuts it from rollouts that all use their budgets."""
    B, P, R = (
        settings[key]
        for key in (
            "train.micro_batch_size",
            "sampler.max_prompt_tokens",
            "sampler.max_response_tokens",
        )
    )
    full = rollout.Rollout(
        tokens_BxR=np.zeros((B, R), np.int32),
        lengths_B=np.full(B, R),
        stopped_B=np.zeros(B, bool),
        logprobs_BxR=np.zeros((B, R), np.float32),
    )
    # The teacher's prompt is the longer one, by its instruction.
    prompts = [[0] * (P - min(_INSTRUCTION, P - 1))] * B, [[0] * P] * B
    (batch,) = rollout.micro_batches(full, *prompts, micro_batch_size=B, longest=P + R, pad_id=0)
    return jax.tree.map(lambda leaf: _rows(mesh, leaf.dtype, *leaf.shape), batch)


def _generate(
    spec: Mapping[str, Any], mesh: Mesh, like: distill.TrainState, B: int, width: int
) -> Program:
    """The sampler's one jitted call, with room for `width` tokens in each of B responses."""
    model, settings = _model(spec), spec["settings"]
    mesh = sampler.decode_mesh(model, mesh, settings["mesh.decode_tensor"])
    P = settings["sampler.max_prompt_tokens"]
    request = sampler.Request(
        prompts_BxP=_rows(mesh, jnp.int32, B, P),
        prompt_lengths_B=_rows(mesh, jnp.int32, B),
        keys_B=_rows(mesh, jax.eval_shape(lambda: jax.random.key(0)).dtype, B),
        sampling=sampling.SamplingParams(),
        stop_ids=np.zeros(2, np.int32),
        pad_id=0,
    )
    weights = _decode_weights(like.student, model, mesh)
    cache = jax.ShapeDtypeStruct(
        (2 * model.num_hidden_layers, B, model.num_key_value_heads, P + width, model.head_dim),
        model.compute_dtype,
        sharding=NamedSharding(
            mesh,
            sharding.spec(sharding.DECODE_RULES, ("layers", "batch", "kv_heads", None, None)),
        ),
    )
    parts = {
        "decode_weights": memory.device_bytes(weights),
        "kv_cache": memory.device_bytes(cache),
    }
    return Program(
        sampler.generate,
        (like.student, model, request),
        {"mesh": mesh, "vocab_size": spec["vocab_size"], "response_width": width},
        state=(like.student,),
        parts=parts,
        steps=width,
    )


def _segment(
    spec: Mapping[str, Any],
    mesh: Mesh,
    like: distill.TrainState,
    B: int,
    width: int,
    refilled: bool,
) -> Program:
    """A segment of continuous batching in B slots, when the ring holds whole contexts.

    It counts as if it decoded all `width` tokens.

    Args:
      refilled: whether there are more prompts than slots: a prefill (of a quarter of the slots)
        then runs beside the ring. Else all prompts run first, beside the shortest ring, which is
        not counted.
    """
    model, settings = _model(spec), spec["settings"]
    mesh = sampler.decode_mesh(model, mesh, settings["mesh.decode_tensor"])
    layout = continuous.Layout(
        model=model,
        mesh=mesh,
        vocab_size=spec["vocab_size"],
        rows=B,
        prompt_width=settings["sampler.max_prompt_tokens"],
        longest_prompt=settings["sampler.max_prompt_tokens"],
        response_width=width,
        segment=continuous.SEGMENT,
        pad_id=0,
    )
    state = jax.eval_shape(
        lambda: slots.empty(model, mesh, B, layout.columns[-1], layout.segment + 1)
    )
    placed = zip(state, slots.placements(mesh), strict=True)
    state = slots.Slots(*(_lying(part, place) for part, place in placed))
    outside = _decode_weights(decode.outside_layers(like.student), model, mesh)
    layer = jax.eval_shape(
        lambda stacked: decode.layer_for_decoding(stacked, model, mesh, 0), like.student["layers"]
    )
    layer = jax.tree.map(_lying, layer, decode.layer_placements(mesh))
    weights = decode.Weights(outside, [layer] * model.num_hidden_layers)
    parts = {
        "decode_weights": memory.device_bytes(weights),
        "kv_cache": memory.device_bytes(state.caches),
    }
    prompts = None
    if refilled:
        M, P = layout.prompts, layout.prompt_width
        prompts = _rows(mesh, jnp.int32, M, P), _rows(mesh, jnp.int32, M)
        done = jax.eval_shape(
            lambda weights, prompts: prefill.by_layers(weights, model, mesh, *prompts),
            weights,
            prompts,
        )
        caches = _lying(done.caches, prefill.cache_placement(mesh))
        parts["prompts"] = memory.device_bytes(caches)
    rules = slots.Rules(sampling.SamplingParams(), np.zeros(2, np.int32))
    return Program(
        _prefill_and_segment,
        (weights, model, state, rules, prompts),
        {"mesh": mesh, "vocab_size": spec["vocab_size"]},
        parts=parts,
        steps=width,
    )


@functools.partial(
    jax.jit, static_argnames=("model", "mesh", "vocab_size"), donate_argnames="state"
)
def _prefill_and_segment(
    weights: decode.Weights,
    model: Qwen3Config,
    state: slots.Slots,
    rules: slots.Rules,
    prompts: tuple[jax.Array, jax.Array] | None,
    *,
    mesh: Mesh,
    vocab_size: int,
) -> Any:
    """Programs of a run as one: what the first returns stays beside the second."""
    kept = None
    if prompts is not None:
        kept = prefill.by_layers(weights, model, mesh, *prompts)
        # Nothing else says which comes first.
        kept, state = jax.lax.optimization_barrier((kept, state))
    advanced = slots.advance(weights, model, state, rules, mesh=mesh, vocab_size=vocab_size)
    return kept, advanced


def _decode_weights(params: qwen3.Params, model: Qwen3Config, mesh: Mesh) -> qwen3.Params:
    """Stands for parameters, all or some, in compute dtype and split as in decoding."""
    placed = qwen3.shardings(model, mesh, sharding.DECODE_RULES)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, model.compute_dtype, sharding=place),
        params,
        {name: placed[name] for name in params},
    )


def _lying(tree: Any, place: Any) -> Any:
    """Stands for arrays that lie so."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree
    )


def make_mesh(topology: Topology, sizes: Mapping[str, int]) -> Mesh:
    """The mesh on abstract TPU devices, or on host devices in place of GPUs."""
    from jax.experimental import mesh_utils, topologies

    shape = tuple(sizes[axis] for axis in sharding.MESH_AXES)
    if topology.platform == "tpu":
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices
    else:
        devices = jax.devices("cpu")
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def compile_into(folder: pathlib.Path, name: str, spec: Mapping[str, Any], mesh: Mesh) -> None:
    """Traces and compiles one program; what it finds lies in `folder` (see above)."""
    program = build(name, spec, mesh)
    traced = program.jitted.trace(*program.args, **program.static)
    found = {
        "cost": roofline.count(traced.jaxpr, program.steps)._asdict(),
        "arguments": memory.device_bytes(program.args),
        "state": memory.device_bytes(program.state),
        "parts": dict(program.parts),
    }
    (folder / "traced.json").write_text(json.dumps(found))
    platform = mesh.devices.flat[0].platform
    options = {"xla_dump_to": str(folder)} | _COMPILER_OPTIONS.get(platform, {})
    traced.lower(lowering_platforms=(platform,)).compile(compiler_options=options)


def _end_with_parent() -> None:
    """Ends a compilation that nobody waits for: the pipe closes when the parent is gone."""
    sys.stdin.read()
    os._exit(1)


def main(argv: list[str]) -> int:
    """Compiles what standard input asks for."""
    folder = pathlib.Path(argv[1])
    asked = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        mesh = make_mesh(parse(asked["topology"]), asked["spec"]["mesh"])
        compile_into(folder, asked["program"], asked["spec"], mesh)
    except Exception as error:  # whatever the compiler says is the finding
        (folder / "error.txt").write_text(f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
