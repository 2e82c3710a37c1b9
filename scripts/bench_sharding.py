"""What each mesh costs on the devices there are: python scripts/bench_sharding.py --host_devices=8

Runs the sampler (as one program: a run samples long responses in segments), the train step and the
teacher's refresh of a randomly initialised model on a list of meshes and prints one JSON object a
line for each: seconds to compile and to run, tokens/s, memory of each compiled program on a device,
and its collectives (number and bytes of results, by kind; loops count in full where their length is
known, a decode loop once: a token). `ratio` is the step's time over the first mesh's. A table and a
plot with the same figures lie in --out.

    python scripts/bench_sharding.py --host_devices=8 --meshes 8x1,4x2,2x4,1x8
    python scripts/bench_sharding.py --shape qwen3_0p6b --dtype bfloat16 --batch 32 --response 2048

A mesh is written FSDPxTENSOR. On host devices, times only say which mesh does more work: all share
the same cores.
"""

import dataclasses
import importlib.util
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from opsdc_jax import cli, config, distill, files, rollout, sampler, sampling, sharding
from opsdc_jax.models import qwen3
from opsdc_jax.models.layers import Qwen3Config
from opsdc_jax.models.shapes import SHAPES
from opsdc_jax.planner import hlo
from opsdc_jax.planner.topology import GIB

# Every mesh of 8 divides it: 8 query and 8 key/value heads, a vocabulary of 512.
_SMALL = Qwen3Config(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=32,
    tie_word_embeddings=True,
)
_SHAPES = {"small": _SMALL, **SHAPES}


class Work(NamedTuple):
    """What is run: rows of a batch and of a micro-batch, widths in tokens, repetitions."""

    model: Qwen3Config
    batch: int
    micro: int
    prompt: int
    response: int
    steps: int


def main(argv: Sequence[str]) -> int:
    """Measures every mesh; writes the table and the plot."""
    values = flags.FlagValues()
    define = {"flag_values": values}
    flags.DEFINE_integer(
        "host_devices", 0, "run on so many host devices; 0: what is there", **define
    )
    flags.DEFINE_list("meshes", [], "FSDPxTENSOR, ...; empty: all powers of 2", **define)
    flags.DEFINE_enum("shape", "small", list(_SHAPES), "architecture", **define)
    flags.DEFINE_enum("dtype", "float32", config.DTYPES, "of activations and products", **define)
    flags.DEFINE_integer("batch", 16, "rollouts a step", 1, **define)
    flags.DEFINE_integer("micro_batch", 8, "rows of a micro-batch", 1, **define)
    flags.DEFINE_integer("prompt", 32, "tokens of a prompt", 1, **define)
    flags.DEFINE_integer("response", 96, "tokens of a response; all are used", 1, **define)
    flags.DEFINE_integer("steps", 3, "repetitions, after one to warm up", 1, **define)
    flags.DEFINE_string("out", "runs/bench_sharding", "folder of the table and the plot", **define)
    args = cli.parse(values, argv)
    if args.host_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.host_devices)
    model = dataclasses.replace(_SHAPES[args.shape], compute_dtype=args.dtype, remat="full")
    work = Work(model, args.batch, args.micro_batch, args.prompt, args.response, args.steps)
    meshes = [parse_mesh(text) for text in args.meshes] or powers_of_two(jax.device_count())
    check(meshes, work)
    if importlib.util.find_spec("matplotlib") is None:
        raise config.InputError("the plot needs matplotlib: pip install 'opsdc-jax[bench]'")
    out = pathlib.Path(args.out)
    with files.writing(out):
        out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for sizes in meshes:
        row = measure(sizes, work)
        row["ratio"] = round(row["step_seconds"] / (rows or [row])[0]["step_seconds"], 3)
        rows.append(row)
        print(json.dumps({"benchmark": "sharding", "shape": args.shape} | row), flush=True)
    (out / "sharding.md").write_text(table(rows) + "\n", encoding="utf-8")
    plot(rows, out / "sharding.png")
    print(f"\n{table(rows)}\n\ntable and plot are in {out}", file=sys.stderr)
    return cli.EXIT_DONE


def parse_mesh(text: str) -> dict[str, int]:
    """The mesh axes' sizes of "4x2".

    Raises:
      InputError: not of that form.
    """
    sizes = text.split("x")
    if len(sizes) != 2 or not all(size.isdecimal() and int(size) for size in sizes):
        raise config.InputError(f"--meshes: {text!r} is not FSDPxTENSOR, such as 4x2")
    return {"replica": 1, "fsdp": int(sizes[0]), "tensor": int(sizes[1])}


def powers_of_two(devices: int) -> list[dict[str, int]]:
    """Every mesh of all devices whose tensor axis is a power of 2, at most 8."""
    widths = [width for width in (1, 2, 4, 8) if devices % width == 0]
    return [{"replica": 1, "fsdp": devices // width, "tensor": width} for width in widths]


def check(meshes: Sequence[Mapping[str, int]], work: Work) -> None:
    """Refuses, before anything is compiled, meshes that do not fit the devices or the work."""
    for sizes in meshes:
        mesh = sharding.make_mesh(sizes)
        qwen3.shardings(work.model, mesh)
        sharding.check_divides(sampler.decode_mesh(work.model, mesh, -1), "--batch", work.batch)
        sharding.check_divides(mesh, "--micro_batch", work.micro)
    if work.batch % work.micro:
        raise config.InputError(
            f"--batch={work.batch} is not a multiple of --micro_batch={work.micro}"
        )


class Timed(NamedTuple):
    """A compiled program and what its compilation told."""

    call: Callable[..., Any]
    seconds: float
    memory_gib: float
    collectives: dict[str, dict[str, int]]


def compiled(jitted: Any, *args: Any, **static: Any) -> Timed:
    """Compiles for these arguments."""
    began = time.perf_counter()
    made = jitted.lower(*args, **static).compile()
    seconds = time.perf_counter() - began
    used = made.memory_analysis()
    size = used.argument_size_in_bytes + used.temp_size_in_bytes
    size += used.output_size_in_bytes - used.alias_size_in_bytes
    return Timed(made, seconds, size / GIB, hlo.collectives(made.as_text()))


def measure(sizes: Mapping[str, int], work: Work) -> dict[str, Any]:
    """The figures of one mesh."""
    mesh = sharding.make_mesh(sizes)
    placed = qwen3.shardings(work.model, mesh)
    step = distill.make_train_step(
        work.model,
        distill.make_optimizer(config.default_config().optim),
        divergence="reverse_kl",
        chunk_tokens=512,
        vocab_size=work.model.vocab_size,
        shardings=placed,
        teacher_dtype=work.model.compute_dtype,
    )
    init = jax.jit(qwen3.init_params, static_argnums=0, out_shardings=placed)
    state = step.init(init(work.model, jax.random.key(0)))
    request, batches = inputs(work, mesh)
    accumulator = step.zeros(state.student)
    static = {
        "mesh": sampler.decode_mesh(work.model, mesh, -1),
        "vocab_size": work.model.vocab_size,
        "response_width": work.response,
    }
    generate = compiled(sampler.generate, state.student, work.model, request, **static)
    accumulate = compiled(step.accumulate, state.student, state.teacher, accumulator, batches[0])
    apply = compiled(step.apply, state, accumulator)
    refresh = compiled(step.refresh, state.student, state.teacher)
    programs = {
        "rollout": generate,
        "accumulate": accumulate,
        "apply": apply,
        "refresh": refresh,
    }
    seconds: dict[str, list[float]] = {"rollout": [], "update": []}
    loss = None
    for _ in range(work.steps + 1):
        began = time.perf_counter()
        jax.block_until_ready(generate.call(state.student, request))
        sampled = time.perf_counter()
        accumulator = step.zeros(state.student)
        for batch in batches:
            accumulator = accumulate.call(state.student, state.teacher, accumulator, batch)
        state, metrics = apply.call(state, accumulator)
        loss = float(metrics["loss"]) if loss is None else loss  # of the first step, on all meshes
        jax.block_until_ready(state)
        seconds["rollout"].append(sampled - began)
        seconds["update"].append(time.perf_counter() - sampled)
    middle = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    tokens = work.batch * work.response
    return {
        "mesh": f"{sizes['fsdp']}x{sizes['tensor']}",
        "device": jax.devices()[0].device_kind,
        "step_seconds": round(sum(middle.values()), 6),
        "rollout_seconds": round(middle["rollout"], 6),
        "update_seconds": round(middle["update"], 6),
        "tokens_per_second": round(tokens / sum(middle.values()), 1),
        "loss": loss,
        "compile_seconds": {name: round(made.seconds, 2) for name, made in programs.items()},
        "memory_gib": {name: round(made.memory_gib, 4) for name, made in programs.items()},
        "collectives": {name: made.collectives for name, made in programs.items()},
    }


def inputs(work: Work, mesh: Any) -> tuple[sampler.Request, list[rollout.DistillBatch]]:
    """Random prompts to sample for, and the batches of one step, each row of full width."""
    rng = np.random.default_rng(0)
    rows = sharding.batch_sharding(mesh)
    decoding = sharding.batch_sharding(sampler.decode_mesh(work.model, mesh, -1))
    B, V = work.batch, work.model.vocab_size
    prompts = rng.integers(0, V, (B, work.prompt), np.int32)
    lengths = np.full(B, work.prompt, np.int32)
    responses = rng.integers(0, V, (B, work.response), np.int32)
    whole = np.concatenate([prompts, responses], axis=1)
    batch = rollout.DistillBatch(
        student_BxT=whole,
        teacher_BxT=np.roll(whole, 1, axis=0),
        student_prompt_B=lengths,
        teacher_prompt_B=lengths,
        response_BxR=responses,
        lengths_B=np.full(B, work.response, np.int32),
        logprobs_BxR=np.zeros((B, work.response), np.float32),
        weights_B=np.ones(B, np.float32),
        shares_B=np.full(B, work.response, np.float32),
    )
    keys = sampling.sequence_keys(0, sampling.TRAIN_STREAM, 0, np.arange(B))
    request = sampler.Request(
        *jax.device_put((prompts, lengths, keys), decoding),
        sampling=sampling.SamplingParams(1.0, 1.0, 0, work.response),
        stop_ids=np.array([V], np.int32),  # no token: every response uses its budget
        pad_id=0,
    )
    starts = range(0, B, work.micro)
    cut = [jax.tree.map(lambda leaf, s=s: leaf[s : s + work.micro], batch) for s in starts]
    return request, [jax.device_put(part, rows) for part in cut]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The figures as a Markdown table."""
    head = "| mesh | step s | rollout s | update s | tokens/s | compile s | GiB | collectives GiB |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = [
            row["mesh"],
            f"{row['step_seconds']:.3f}",
            f"{row['rollout_seconds']:.3f}",
            f"{row['update_seconds']:.3f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{sum(row['compile_seconds'].values()):.1f}",
            f"{max(row['memory_gib'].values()):.3f}",
            f"{moved(row) / GIB:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def moved(row: Mapping[str, Any]) -> int:
    """Bytes of all collectives of one micro-batch, on each device."""
    return sum(kind["bytes"] for kind in row["collectives"]["accumulate"].values())


def plot(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Step time, memory and collectives by mesh, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    names = [row["mesh"] for row in rows]
    below = np.zeros(len(rows))
    for part in ("rollout", "update"):
        heights = np.array([row[f"{part}_seconds"] for row in rows])
        axes[0].bar(names, heights, bottom=below, label=part)
        below += heights
    axes[0].legend()
    axes[1].bar(names, [max(row["memory_gib"].values()) for row in rows])
    axes[2].bar(names, [moved(row) / GIB for row in rows])
    titles = ("seconds a step", "peak GiB on a device", "collectives of a micro-batch, GiB")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title)
        axis.set_xlabel("fsdp x tensor")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(cli.run(main))
