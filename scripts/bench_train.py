"""Speed and memory of the train step: python scripts/bench_train.py --shape small

Runs whole optimizer steps (student and teacher forward, loss, backward, clip, AdamW) of a randomly
initialised model in float32, on rows that all have their full width, and prints one JSON object:
  seconds         of the median step, after --warmup of them; compilation is not counted
  cpu_seconds     of all its threads: what a busy machine leaves comparable
  tokens_per_second  positions of the student's rows over that, prompts included
  tflop           floating-point operations a step, see `flops`; recomputation does not count
  share           of the rate of a [3072, 512] x [512, 1536] product timed in the same process
  products_share  the same of the step's matrix products alone, each shape timed by itself and
                  none of them repeated: what share would be if all else cost nothing
  compile_seconds  of the step's programs; fewer where an earlier process has left them in the
                  cache on disk, which is that of a run
  peak_rss_gib    of the process, start-up and this compilation included
  loss            of the last step

    python scripts/bench_train.py --shape small --batch 16 --prompt 64 --response 128
    python scripts/bench_train.py --shape v152k --batch 4 --response 192 --chunk 64 \
        --remat full --against torch

With --against torch, a plain step in torch on transformers' Qwen3 (see `torch_step`) does the same
work: --pairs times both run after each other, each in a process of its own, in alternating order.
Their lines are followed by one with `ratio`, the median of seconds over torch's, and `rss_ratio`.
--micro_batch, --chunk and --remat are of ours alone: the torch step has none of them.
"""

import dataclasses
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from opsdc_jax import cli, config, distill, rollout, sharding
from opsdc_jax.metrics import CompileCounter
from opsdc_jax.models import qwen3
from opsdc_jax.models.layers import Qwen3Config
from opsdc_jax.models.shapes import BENCHMARK_SHAPES

SIDES = ("jax", "torch")
PRODUCT = 3072, 512, 1536  # the product whose rate is the bound
ADAMW = config.default_config().optim


class Work(NamedTuple):
    """What is run: rows of a batch and of a micro-batch, widths in tokens, repetitions."""

    model: Qwen3Config
    batch: int
    micro_batch: int
    prompt: int
    response: int
    chunk: int
    warmup: int
    steps: int


class Inputs(NamedTuple):
    """Random token ids: each side's prompts [B, prompt], and responses [B, response]."""

    student: np.ndarray
    teacher: np.ndarray
    responses: np.ndarray


def main(argv: Sequence[str]) -> int:
    """Measures one side in this process, or both in turns in processes of their own."""
    defaults = config.default_config()
    values = flags.FlagValues()
    define = {"flag_values": values}
    flags.DEFINE_enum("shape", "small", list(BENCHMARK_SHAPES), "architecture", **define)
    flags.DEFINE_integer("batch", 16, "rows of a step", 1, **define)
    flags.DEFINE_integer("micro_batch", 0, "rows at a time; 0: all; torch: all", 0, **define)
    flags.DEFINE_integer("prompt", 64, "tokens of each side's prompts", 1, **define)
    flags.DEFINE_integer("response", 128, "tokens of each response", 1, **define)
    flags.DEFINE_integer(
        "chunk", defaults.loss.chunk_tokens, "tokens whose logits exist at a time", 1, **define
    )
    flags.DEFINE_enum("remat", "none", config.REMAT_POLICIES, "model.remat of a run", **define)
    flags.DEFINE_integer("warmup", 2, "steps before the measured ones", 0, **define)
    flags.DEFINE_integer("steps", 5, "measured steps", 1, **define)
    flags.DEFINE_enum("side", "jax", SIDES, "what runs", **define)
    flags.DEFINE_enum("against", None, ["torch"], "compare with it, in turns", **define)
    flags.DEFINE_integer("pairs", 5, "of processes, with --against", 1, **define)
    args = cli.parse(values, argv)
    work = Work(
        dataclasses.replace(BENCHMARK_SHAPES[args.shape], remat=args.remat),
        **{name: getattr(args, name) for name in Work._fields[1:]},
    )
    work = work._replace(micro_batch=work.micro_batch or work.batch)
    if work.batch % work.micro_batch:
        raise config.InputError(
            f"--batch={work.batch} is not a multiple of --micro_batch={work.micro_batch}"
        )
    if "torch" in (args.side, args.against) and importlib.util.find_spec("torch") is None:
        raise config.InputError("torch is not installed in this environment: pip install torch")
    if args.against:
        compare(args)
        return cli.EXIT_DONE
    cli.use_compilation_cache()
    print(json.dumps({"benchmark": "train", "shape": args.shape} | measure(args.side, work)))
    return cli.EXIT_DONE


def measure(side: str, work: Work) -> dict[str, Any]:
    """The figures of one side, in this process."""
    compilations = CompileCounter()
    step = {"jax": jax_step, "torch": torch_step}[side](work)
    seconds, cpu_seconds, loss = [], [], 0.0
    for _ in range(work.warmup + work.steps):
        began, cpu_began = time.perf_counter(), time.process_time()
        loss = step()
        seconds.append(time.perf_counter() - began)
        cpu_seconds.append(time.process_time() - cpu_began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    compiling = compilations.seconds
    middle = statistics.median(seconds[work.warmup :])
    tokens = work.batch * (work.prompt + work.response)
    bound = product_rate() if side == "jax" else None
    alone = products_seconds(work) if side == "jax" else None
    return {
        "side": side,
        **{name: getattr(work, name) for name in Work._fields[1:]},
        "remat": work.model.remat,
        "seconds": round(middle, 4),
        "cpu_seconds": round(statistics.median(cpu_seconds[work.warmup :]), 4),
        "tokens_per_second": round(tokens / middle, 1),
        "tflop": round(flops(work) / 1e12, 4),
        "gflops_per_second": round(flops(work) / middle / 1e9, 1),
        "bound_gflops_per_second": bound and round(bound / 1e9, 1),
        "share": bound and round(flops(work) / middle / bound, 3),
        "products_share": bound and alone and round(flops(work) / alone / bound, 3),
        "compile_seconds": round(compiling, 1),
        "peak_rss_gib": round(peak, 3),
        "loss": round(loss, 5),
    }


def flops(work: Work) -> int:
    """Floating-point operations a step needs, of its matrix products alone.

    A student's weight takes 6 a position (2 forward, 4 backward), a teacher's 2; those of the heads
    at response positions only. Attention counts what is on and below the diagonal.
    """
    model, T = work.model, work.prompt + work.response
    H, N, K = model.num_attention_heads, model.num_key_value_heads, model.head_dim
    D, F, L = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    layer = D * K * (2 * H + 2 * N) + 3 * D * F
    scores = 2 * H * K * (T + 1) // 2  # products of a position: with keys, and with values
    head = model.vocab_size * D
    return 8 * work.batch * (T * L * (layer + scores) + work.response * head)


def product_rate() -> float:
    """Floating-point operations a second of `PRODUCT`."""
    M, K, N = PRODUCT
    return 2 * M * K * N / product_seconds("mk,kn->mn", (M, K), (K, N))


def product_seconds(equation: str, *shapes: tuple[int, ...]) -> float:
    """Of one matrix product: the median of 30 runs, after 10."""
    multiply = jax.jit(lambda *factors: jnp.einsum(equation, *factors))
    factors = [jnp.ones(shape) for shape in shapes]
    seconds = []
    for _ in range(40):
        began = time.perf_counter()
        jax.block_until_ready(multiply(*factors))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[10:])


def products_seconds(work: Work) -> float:
    """Of all matrix products of a step, as if nothing lay between them.

    A weight is multiplied by both sides' activations, and twice more backwards. Dense attention
    multiplies whole [T, T] arrays: two a side, and five backwards, which forms the scores again.
    """
    model, T = work.model, work.prompt + work.response
    H, N, K = model.num_attention_heads, model.num_key_value_heads, model.head_dim
    D, F, L = model.hidden_size, model.intermediate_size, model.num_hidden_layers

    def of_weight(rows: int, width: int, outputs: int) -> float:
        x, w, y = (rows, width), (width, outputs), (rows, outputs)
        forward = product_seconds("mk,kn->mn", x, w)
        slopes = product_seconds("mn,kn->mk", y, w)
        return 2 * forward + slopes + product_seconds("mk,mn->kn", x, y)

    widths = [(D, H * K), *[(D, N * K)] * 2, (H * K, D), *[(D, F)] * 2, (F, D)]
    known = {shape: of_weight(work.micro_batch * T, *shape) for shape in set(widths)}
    queries, keys = (work.micro_batch, N, H // N * T, K), (work.micro_batch, N, T, K)
    scores = (*queries[:3], T)
    to_scores = product_seconds("bnqk,bnsk->bnqs", queries, keys)
    to_queries = product_seconds("bnqs,bnsk->bnqk", scores, keys)
    to_keys = product_seconds("bnqs,bnqk->bnsk", scores, queries)
    layer = sum(known[shape] for shape in widths) + 4 * to_scores + 3 * to_queries + 2 * to_keys
    tokens = work.micro_batch * work.response
    chunk = min(work.chunk, tokens)
    head = tokens / chunk * of_weight(chunk, D, model.vocab_size)
    return work.batch / work.micro_batch * (L * layer + head)


def inputs(work: Work) -> Inputs:
    """The same for both sides."""
    rng = np.random.default_rng(0)
    widths = work.prompt, work.prompt, work.response
    return Inputs(
        *(rng.integers(0, work.model.vocab_size, (work.batch, w), np.int32) for w in widths)
    )


def jax_step(work: Work) -> Callable[[], float]:
    """The step as scripts/train.py takes it, from the host's arrays to the new parameters."""
    given = inputs(work)
    shape = given.responses.shape
    sampled = rollout.Rollout(
        tokens_BxR=given.responses,
        lengths_B=np.full(work.batch, work.response, np.int32),
        stopped_B=np.zeros(work.batch, bool),
        logprobs_BxR=np.zeros(shape, np.float32),
    )
    mesh = sharding.make_mesh({"replica": 1, "fsdp": -1, "tensor": 1})
    rows = sharding.batch_sharding(mesh)
    placed = qwen3.shardings(work.model, mesh)
    jitted = distill.make_train_step(
        work.model,
        distill.make_optimizer(ADAMW),
        divergence="reverse_kl",
        chunk_tokens=work.chunk,
        vocab_size=work.model.vocab_size,
        shardings=placed,
        teacher_dtype="float32",
    )
    init = jax.jit(qwen3.init_params, static_argnums=0, out_shardings=placed)
    # Another model than the student: the gradient to an equal one is zero, and numbers near it are
    # slow. Both before there are moments: to draw the numbers takes more memory than a step.
    teacher, student = (init(work.model, jax.random.key(seed)) for seed in (1, 0))
    state = dataclasses.replace(jitted.init(student), teacher=teacher)

    def step() -> float:
        nonlocal state
        micro_batches = rollout.micro_batches(
            sampled,
            given.student.tolist(),
            given.teacher.tolist(),
            micro_batch_size=work.micro_batch,
            longest=work.prompt + work.response,
            pad_id=0,
        )
        batches = (sharding.place(batch, rows) for batch in micro_batches)
        if len(micro_batches) == 1:
            accumulator = jitted.single(state.student, state.teacher, *batches)
        else:
            accumulator = jitted.zeros(state.student)
            for batch in batches:
                accumulator = jitted.accumulate(state.student, state.teacher, accumulator, batch)
        state, metrics = jitted.apply(state, accumulator)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return step


def torch_models(model: Qwen3Config) -> tuple[Any, Any]:
    """Student and teacher, two random initialisations of transformers' Qwen3 in float32."""
    import torch
    import transformers

    torch.manual_seed(0)
    keys = (field.name for field in dataclasses.fields(Qwen3Config))
    known = {key: getattr(model, key) for key in keys if hasattr(transformers.Qwen3Config, key)}
    architecture = transformers.Qwen3Config(
        **known | {"rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta}}
    )
    make = transformers.Qwen3ForCausalLM._from_config
    student, teacher = (
        make(architecture, attn_implementation="sdpa", dtype=torch.float32) for _ in range(2)
    )
    return student.train(), teacher.eval().requires_grad_(False)


def torch_step(work: Work) -> Callable[[], float]:
    """The step as one would write it in torch, all rows at once; see `torch_loss`."""
    import torch

    given = inputs(work)
    student, teacher = torch_models(work.model)
    optimizer = torch.optim.AdamW(
        student.parameters(),
        lr=ADAMW.lr,
        betas=(ADAMW.b1, ADAMW.b2),
        weight_decay=ADAMW.weight_decay,
    )

    def step() -> float:
        loss = torch_loss(student, teacher, given) / given.responses.size
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), ADAMW.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def torch_loss(student: Any, teacher: Any, given: Inputs) -> Any:
    """Sum of the reverse KL over the response tokens, from whole logits of these positions only.

    Rows have no padding, so the models need no mask.
    """
    import torch

    def log_probs(model: Any, prompts: np.ndarray) -> Any:
        ids = torch.from_numpy(np.concatenate([prompts, given.responses], axis=1)).long()
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        return model.lm_head(hidden[:, prompts.shape[1] - 1 : -1]).log_softmax(dim=-1)

    with torch.no_grad():
        log_p = log_probs(teacher, given.teacher)
    log_q = log_probs(student, given.student)
    return (log_q.exp() * (log_q - log_p)).sum()


def compare(args: flags.FlagValues) -> None:
    """Runs pairs of fresh processes and prints their figures, then the ratios."""
    arguments = [
        f"--{name}={getattr(args, name)}" for name in ("shape", "remat", *Work._fields[1:])
    ]
    ratios: dict[str, list[float]] = {"ratio": [], "rss_ratio": []}
    for pair in range(args.pairs):
        figures: dict[str, Mapping[str, Any]] = {}
        for side in SIDES if pair % 2 == 0 else reversed(SIDES):
            command = [sys.executable, os.path.abspath(__file__), *arguments, f"--side={side}"]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            print(output, end="", flush=True)
            figures[side] = json.loads(output.splitlines()[-1])  # a warning may come first
        for name, key in (("ratio", "seconds"), ("rss_ratio", "peak_rss_gib")):
            ratios[name].append(figures["jax"][key] / figures["torch"][key])
    lines = {name: round(statistics.median(values), 3) for name, values in ratios.items()}
    lines |= {f"{name}s": [round(v, 3) for v in values] for name, values in ratios.items()}
    print(json.dumps({"benchmark": "train", "shape": args.shape, "against": "torch"} | lines))


if __name__ == "__main__":
    sys.exit(cli.run(main))
