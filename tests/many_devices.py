"""What test_multi_device.py runs in processes of their own: their devices are fixed at the start.

python many_devices.py meshes BASE OUT: train on each mesh of 8 devices, then look at programs
python many_devices.py process BASE OUT: train as one of two processes of 4 devices each
"""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import sys

import jax
import numpy as np
from helpers import ROOT, load_script, random_params

from opsdc_jax import cli, continuous, distill, distributed, prefill, sampler, sharding, slots
from opsdc_jax.config import default_config
from opsdc_jax.models import decode, qwen3
from opsdc_jax.models.layers import Qwen3Config
from opsdc_jax.rollout import Rollout
from opsdc_jax.sampling import SamplingParams, sequence_keys

SCRIPT = load_script("train")
MESHES = {"8x1": (8, 1), "4x2": (4, 2), "2x4": (2, 4), "1x8": (1, 8)}
STEPS, ROWS, RESPONSE, COLUMNS = 5, 16, 12, 52

# 8 query and 8 key/value heads, and a vocabulary that 8 divides: fits every mesh of 8.
EIGHT = Qwen3Config(
    vocab_size=224,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=16,
    rope_theta=10_000.0,
    tie_word_embeddings=True,
    max_position_embeddings=512,
)


def train(base: str, workdir: pathlib.Path, *more: str) -> int:
    """Runs scripts/train.py on the model in `base` for five steps of drawn responses.

    At temperature 1 their losses would differ too little to tell runs apart.
    """
    arguments = [
        f"--workdir={workdir}",
        f"--config.model.path={base}",
        f"--config.train.steps={STEPS}",
        f"--config.train.batch_size={ROWS}",
        f"--config.train.micro_batch_size={ROWS}",
        f"--config.sampler.max_response_tokens={RESPONSE}",
        "--config.sampler.temperature=0.5",
        "--config.teacher.every=2",
        "--config.sampler.max_prompt_tokens=32",
        "--config.eval.samples_per_level=3",
        f"--config.eval.batch_size={ROWS}",
        "--config.eval.every=0",
        f"--config.eval.max_response_tokens={RESPONSE}",
        "--config.checkpoint.every_steps=0",
        "--config.log.samples_every=1",
        f"--config.log.samples={ROWS}",
    ]
    config = ROOT / "configs" / "tiny.py"
    argv = ["train.py", f"--config={config}", *arguments, *more]
    return cli.run(SCRIPT.main, argv)


def meshes(base: str, out: pathlib.Path) -> None:
    """Five steps on every mesh; prints what the programs of the first do."""
    calls = []

    def generate(*arguments: object, **static: object) -> Rollout:
        calls.append((arguments, static))
        return compiled(*arguments, **static)

    compiled, sampler.generate = sampler.generate, generate
    for name, (fsdp, tensor) in MESHES.items():
        sizes = [f"--config.mesh.fsdp={fsdp}", f"--config.mesh.tensor={tensor}"]
        assert train(base, out / name, *sizes, "--config.eval.source=none") == cli.EXIT_DONE
    arguments, static = calls[0]
    decode = compiled.lower(*arguments, **static).compile().as_text()
    looked_at = {"decode": decode_program(decode), "train": train_programs(8, 1)}
    drawings = {"greedy": SamplingParams(0.0), "drawn": SamplingParams()}
    for rows in (0, ROWS // 2):
        for name, drawing in drawings.items():
            found = [sampled(width, drawing, rows) for width in (2, 8)]
            looked_at[name] = [*looked_at.get(name, []), *found]
        short_segments()
    print(json.dumps(looked_at | {"segments": segment_programs()}))


def short_segments() -> None:
    """Makes responses of these few tokens take several segments and sizes of the ring."""
    continuous.SEGMENT, continuous.LEAST_COLUMNS = 4, 8


def sampled(width: int, drawing: SamplingParams, rows: int = 0) -> list[list[int]]:
    """Responses of a model of 2 key/value heads, its layers split over `width` devices.

    One token in 16 ends a response.
    """
    model = dataclasses.replace(EIGHT, num_key_value_heads=2)
    mesh = sharding.make_mesh({"replica": 1, "fsdp": 8, "tensor": 1})
    sample = sampler.Sampler(
        model=model,
        mesh=sampler.decode_mesh(model, mesh, width),
        prompt_buckets=(6,),
        response_width=RESPONSE,
        vocab_size=model.vocab_size,
        stop_ids=tuple(range(0, model.vocab_size, 16)),
        pad_id=0,
        slots=rows,
    )
    params = jax.device_put(random_params(model, 1), qwen3.shardings(model, mesh))
    prompts = [[1 + row, *range(row % 5)] for row in range(ROWS)]
    keys = sequence_keys(0, 0, 0, np.arange(ROWS))
    out = sample(params, prompts, keys, drawing)
    return [
        row[:length].tolist() for row, length in zip(out.tokens_BxR, out.lengths_B, strict=True)
    ]


def segment_programs() -> dict[str, list[str]]:
    """What is exchanged in the programs of continuous batching, rows over 4 devices, heads over 2.

    Returns:
      the shapes that each program gathers, permutes or reduces; "layout" is of a layer's weights.
    """
    model = dataclasses.replace(EIGHT, num_key_value_heads=2)
    training = sharding.make_mesh({"replica": 1, "fsdp": 8, "tensor": 1})
    mesh = sampler.decode_mesh(model, training, 2)
    static = {"mesh": mesh, "vocab_size": model.vocab_size}
    params = jax.device_put(random_params(model, 1), qwen3.shardings(model, training))
    weights = decode.prepare(params, model, mesh)
    state = slots.empty(model, mesh, ROWS, COLUMNS, 5)
    prompts = np.zeros((4, 6), np.int32), np.full(4, 6, np.int32)
    prefilled = prefill.by_layers(weights, model, mesh, *prompts)
    start = slots.Refill(
        0,
        *(np.zeros(ROWS, kind) for kind in ("int32", bool, "int32", "int32")),
        np.zeros((ROWS, 2), np.uint32),
    )
    rules = slots.Rules(SamplingParams(), np.zeros(2, np.int32))
    texts = {
        "layout": decode.lay_out_layer.lower(params["layers"], model, mesh, np.int32(0)),
        "refill": slots.refill.lower(weights, state, prefilled, start, rules, **static),
        "advance": slots.advance.lower(weights, model, state, rules, **static),
        "resize": slots.resize.lower(
            state.caches[0], state.column, mesh=mesh, columns=COLUMNS // 2
        ),
    }
    exchange = r"= (.*?) (?:all-gather|all-to-all|all-reduce|collective-permute)(?:-start)?\("
    return {
        name: re.findall(exchange, lowered.compile().as_text()) for name, lowered in texts.items()
    }


def decode_program(text: str) -> dict[str, object]:
    """What the loops of a generate call exchange, in elements, and the shapes of its arrays."""
    return {
        "loops": len(re.findall(r" while\(", text)),
        "reductions": sum(text.count(" all-reduce(") for text in in_loops(text)),
        "gathered": [
            int(np.prod([int(size) for size in shape.split(",") if size]))
            for block in in_loops(text)
            for shape in re.findall(r"\w+\[([\d,]*)\]\S* (?:all-gather|all-to-all)\(", block)
        ],
        "shapes": sorted(set(re.findall(r"\w+\[[\d,]+\]", text))),
    }


def in_loops(text: str) -> list[str]:
    """The computations of a compiled program that run inside a while loop."""
    blocks = dict(re.findall(r"^(?:ENTRY )?%(\S+) \(.*?\{\n(.*?)^\}", text, re.M | re.S))
    reached, front = set(), set(re.findall(r"body=%([\w.\-]+)", text))
    while front:
        name = front.pop()
        reached.add(name)
        front |= set(re.findall(r"%([\w.\-]+)", blocks[name])) & blocks.keys() - reached
    return [blocks[name] for name in reached]


def train_programs(fsdp: int, tensor: int) -> dict[str, object]:
    """How moments are split, what a skipped step leaves, and a device's bytes of a refresh."""
    mesh = sharding.make_mesh({"replica": 1, "fsdp": fsdp, "tensor": tensor})
    shardings = qwen3.shardings(EIGHT, mesh)
    jitted = distill.make_train_step(
        EIGHT,
        distill.make_optimizer(default_config().optim),
        divergence="reverse_kl",
        chunk_tokens=16,
        vocab_size=EIGHT.vocab_size,
        shardings=shardings,
        teacher_dtype="bfloat16",
    )
    state = jitted.init(jax.device_put(random_params(EIGHT, 0), shardings))
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim > 2]
    parts = sorted({leaf.size // leaf.addressable_shards[0].data.size for leaf in moments})
    zeros = jitted.zeros(state.student)
    broken = jax.tree.map(lambda leaf: leaf + np.nan, zeros.gradients)
    before = jax.device_get((state.student, state.optimizer))
    after, _ = jitted.apply(state, dataclasses.replace(zeros, gradients=broken))
    unchanged = jax.tree.map(np.array_equal, (after.student, after.optimizer), before)
    compiled = jitted.refresh.lower(after.student, after.teacher).compile()
    used = compiled.memory_analysis()
    return {
        "parts": parts,
        "aliased": used.alias_size_in_bytes,
        "output": used.output_size_in_bytes,
        "teacher": sum(leaf.nbytes // 8 for leaf in jax.tree.leaves(after.teacher)),
        "unchanged": bool(jax.tree.all(unchanged)),
        "moved": re.findall(r" (all-\S+|collective\S+|copy-start|send|recv)\(", compiled.as_text()),
    }


def process(base: str, out: pathlib.Path) -> None:
    """Five steps as one of two processes; the second is asked to stop in step 3; both go on.

    They go on with another mesh. A copy of the stopped run is left for another number of processes.
    """

    class AskedOnce(SCRIPT.Progress):
        def add(self, step: int, *arguments: object) -> None:
            super().add(step, *arguments)
            if step == 3 and jax.process_index() == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    SCRIPT.Progress = AskedOnce
    short_segments()
    few_slots = f"--config.sampler.slots={ROWS // 2}"
    mesh = "--config.mesh.fsdp=4", "--config.mesh.tensor=2"
    assert train(base, out, *mesh, few_slots) == cli.EXIT_STOPPED
    distributed.first_does(lambda: shutil.copytree(out, out.with_name("stopped")) and None)
    mesh = "--config.mesh.fsdp=2", "--config.mesh.tensor=4"
    assert train(base, out, *mesh, few_slots) == cli.EXIT_DONE


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2], pathlib.Path(sys.argv[3]))
