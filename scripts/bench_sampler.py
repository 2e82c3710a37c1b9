"""Speed of sampling, alone or against another library: python scripts/bench_sampler.py --shape tiny

Samples a fixed number of tokens (temperature 1, nothing stops) from a randomly initialised float32
model and prints JSON objects, one a line:
  seconds            of a whole call, prompts included: the fastest of --repeats, after one to warm
                     up, so compilation is not counted
  tokens_per_second  new tokens of all rows
  decode_ms          of one decode step: a call's time less that of a call for one token
  bound_ms           of the bytes a decode step must read (weights, and keys and values so far) at
                     the read bandwidth measured in the same run (read_gb_per_s)
  share              bound_ms over decode_ms
  peak_rss_gib       of the process, weights and compilation included

With --against torch (transformers' generate on its default threads, with the faster of its eager
and sdpa attention) or --against tunix (its Sampler), both sides take turns in fresh processes,
--pairs times. A line for each pair, and one of medians:
  ratio              the other's seconds over ours
  rss_ratio          ours over the other's

With --scenario spread, lengths are geometric (mean 64, cut at --new, by default 512). 8 x --batch
prompts are sampled in --batch slots (seconds), and in one batch after the other, each of which
waits for its longest response (batches_seconds); `ratio` is the latter over the former.

    python scripts/bench_sampler.py --shape small --against torch
    python scripts/bench_sampler.py --shape small --scenario spread --batch 32
    python scripts/bench_sampler.py --shape q06 --prompt 368   # mean context 384
"""

import dataclasses
import importlib
import importlib.util
import json
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

from opsdc_jax import cli, sampler, sampling, sharding
from opsdc_jax.config import InputError
from opsdc_jax.models import qwen3
from opsdc_jax.models.layers import Qwen3Config
from opsdc_jax.models.qwen3 import Params
from opsdc_jax.models.shapes import BENCHMARK_SHAPES

GIB = 2**30
NEEDS = {
    "torch": ("torch", "pip install torch"),
    "tunix": ("tunix", "pip install google-tunix==0.1.7"),
}


class Case(NamedTuple):
    """What is sampled: a model, rows, and tokens of each prompt and of each response."""

    model: Qwen3Config
    batch: int
    prompt: int
    new: int


CASES: Mapping[str, Case] = {
    "tiny": Case(BENCHMARK_SHAPES["tiny"], batch=32, prompt=32, new=128),
    "small": Case(BENCHMARK_SHAPES["small"], batch=16, prompt=64, new=128),
    "v152k": Case(BENCHMARK_SHAPES["v152k"], batch=16, prompt=64, new=32),
    "q06": Case(BENCHMARK_SHAPES["q06"], batch=8, prompt=64, new=32),
}


def main(argv: Sequence[str]) -> int:
    """Measures one side in this process, or both in processes of their own."""
    values = flags.FlagValues()
    define = {"flag_values": values}
    flags.DEFINE_enum("shape", "tiny", list(CASES), "model, rows and widths", **define)
    flags.DEFINE_integer("batch", 0, "rows; 0: the shape's own", **define)
    flags.DEFINE_integer("prompt", 0, "tokens of a prompt; 0: the shape's own", **define)
    flags.DEFINE_integer("new", 0, "tokens of a response; 0: the shape's own", **define)
    flags.DEFINE_float("top_p", 1.0, "of drawing", **define)
    flags.DEFINE_integer("top_k", 0, "of drawing", **define)
    flags.DEFINE_enum("scenario", "fixed", ["fixed", "spread"], "lengths of responses", **define)
    flags.DEFINE_enum("run", "opsdc", list(RUNS), "whose sampler", **define)
    flags.DEFINE_enum("against", None, list(NEEDS), "compare with another library", **define)
    flags.DEFINE_integer("pairs", 5, "processes of each side", **define)
    flags.DEFINE_integer("repeats", 3, "timed calls in a process; the fastest counts", **define)
    args = cli.parse(values, argv)
    given = {name: getattr(args, name) for name in ("batch", "prompt", "new")}
    case = CASES[args.shape]._replace(**{name: size for name, size in given.items() if size})
    if min(case.batch, case.prompt, args.pairs, args.repeats) < 1 or case.new < 2:
        raise InputError("--batch, --prompt, --pairs, --repeats must be at least 1, --new 2")
    for side in {args.run, args.against} & set(NEEDS):
        require(side)
    if (spread := args.scenario == "spread") and (args.against or args.run != "opsdc"):
        raise InputError(
            "--scenario spread is of this package's sampler alone: leave out --against"
        )
    if spread:
        case = case._replace(new=args.new or 512)
    start = {"benchmark": "sampler", "shape": args.shape} | case._asdict()
    del start["model"]
    if spread:
        print(json.dumps(start | {"scenario": "spread"} | run_spread(case, args.repeats)))
        return cli.EXIT_DONE
    if not args.against:
        drawing = sampling.SamplingParams(1.0, args.top_p, args.top_k, case.new)
        measured = RUNS[args.run](case, drawing, args.repeats)
        print(json.dumps(start | {"run": args.run} | measured))
        return cli.EXIT_DONE
    same = [f"--{name}={getattr(args, name)}" for name in ("shape", "top_p", "top_k", "repeats")]
    same += [f"--{name}={size}" for name, size in given.items()]
    pairs = []
    for number in range(args.pairs):
        ours, theirs = (in_fresh_process([*same, f"--run={s}"]) for s in ("opsdc", args.against))
        pairs.append(compared(ours, theirs))
        print(json.dumps(start | {"against": args.against, "pair": number} | pairs[-1]), flush=True)
    medians = {key: statistics.median(pair[key] for pair in pairs) for key in pairs[0]}
    print(json.dumps(start | {"against": args.against, "median_of": args.pairs} | medians))
    return cli.EXIT_DONE


def require(side: str) -> None:
    """Refuses to compare with what is not installed."""
    module, command = NEEDS[side]
    if importlib.util.find_spec(module) is None:
        raise InputError(f"{side} is not installed in this environment: {command}")


def in_fresh_process(arguments: Sequence[str]) -> dict[str, Any]:
    """What one side printed."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compared(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, float]:
    """Both sides of one pair, and their ratios."""
    return {
        "seconds": ours["seconds"],
        "other_seconds": theirs["seconds"],
        "ratio": round(theirs["seconds"] / ours["seconds"], 3),
        "share": ours["share"],
        "peak_rss_gib": ours["peak_rss_gib"],
        "other_peak_rss_gib": theirs["peak_rss_gib"],
        "rss_ratio": round(ours["peak_rss_gib"] / theirs["peak_rss_gib"], 3),
    }


def random_params(model: Qwen3Config) -> Params:
    """Weights from N(0, 0.02), norms at one; numpy's generator needs no second copy of them."""
    rng = np.random.default_rng(0)

    def fill(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1].key == "scale":
            return jnp.ones(leaf.shape, leaf.dtype)
        array = rng.standard_normal(leaf.shape, np.float32)
        array *= 0.02
        return jnp.asarray(array)

    return jax.tree.map_with_path(fill, qwen3.abstract_params(model))


def random_prompts(case: Case) -> np.ndarray:
    """Token ids from 1 on, [B, P]: 0 is padding."""
    sizes = (case.batch, case.prompt)
    return np.random.default_rng(1).integers(1, case.model.vocab_size, sizes, np.int32)


def read_bandwidth() -> float:
    """Bytes a second at which the devices' memory is read: the maximum of a GiB, fastest of 5."""
    array = jnp.ones((GIB // 4,), jnp.float32)
    return GIB / fastest(lambda: jax.block_until_ready(jnp.max(array)), 5)


def fastest(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest call, after one to warm up."""
    times = []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def speed(case: Case, seconds: float) -> dict[str, float]:
    """What every side tells of a call; memory is of this process so far."""
    return {
        "seconds": round(seconds, 4),
        "tokens_per_second": round(case.batch * case.new / seconds, 1),
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, 3),
    }


def step_bytes(case: Case) -> int:
    """What a decode step must read: every weight once (of a tied embedding, as the head), and the
    keys and values so far, on the average over the response.
    """
    model = case.model
    weights = sum(leaf.size for leaf in jax.tree.leaves(qwen3.abstract_params(model)))
    if not model.tie_word_embeddings:
        weights -= model.vocab_size * model.hidden_size
    kept = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim
    context = case.prompt + case.new / 2
    return int((weights + case.batch * context * kept) * jnp.dtype(model.compute_dtype).itemsize)


def make_sampler(
    case: Case, stop_ids: tuple[int, ...], slots: int = 0
) -> tuple[sampler.Sampler, Params]:
    """This package's sampler, on all devices, and weights for it."""
    mesh = sharding.make_mesh({"replica": 1, "fsdp": -1, "tensor": 1})
    sharding.check_divides(mesh, "--batch", case.batch)
    params = sharding.place(random_params(case.model), sharding.whole(mesh))
    made = sampler.Sampler(
        model=case.model,
        mesh=sampler.decode_mesh(case.model, mesh, -1),
        prompt_buckets=(case.prompt,),
        response_width=case.new,
        vocab_size=case.model.vocab_size,
        stop_ids=stop_ids,
        pad_id=0,
        slots=slots,
    )
    return made, params


def run_opsdc(case: Case, drawing: sampling.SamplingParams, repeats: int) -> dict[str, Any]:
    """This package's sampler; nothing stops."""
    sample, params = make_sampler(case, (case.model.vocab_size,))
    prompts = random_prompts(case).tolist()
    keys = sampling.sequence_keys(0, sampling.TRAIN_STREAM, 0, np.arange(case.batch))

    def call(new: int) -> None:
        out = sample(params, prompts, keys, drawing._replace(max_tokens=new))
        assert np.all(np.asarray(out.lengths_B) == new)

    seconds = fastest(lambda: call(case.new), repeats)
    decode = (seconds - fastest(lambda: call(1), repeats)) / (case.new - 1)
    measured = speed(case, seconds)  # before the bandwidth's own array makes a peak
    bandwidth = read_bandwidth()
    bound = step_bytes(case) / bandwidth
    return measured | {
        "device": jax.devices()[0].device_kind,
        "decode_ms": round(decode * 1000, 3),
        "bound_ms": round(bound * 1000, 3),
        "share": round(bound / decode, 3),
        "read_gb_per_s": round(bandwidth / 1e9, 1),
    }


def run_spread(case: Case, repeats: int) -> dict[str, Any]:
    """Continuous batching beside one batch after the other: the same prompts, the same keys.

    One id of 64 ends a response. The logits of random weights are nearly equal, so the chance of
    such an id is about 1 in 64 at any token.
    """
    model, rows = case.model, case.batch
    sample, params = make_sampler(case, tuple(range(0, model.vocab_size, 64)), slots=rows)
    prompts = random_prompts(case._replace(batch=8 * rows)).tolist()
    keys = sampling.sequence_keys(0, sampling.TRAIN_STREAM, 0, np.arange(len(prompts)))

    def continuous() -> np.ndarray:
        return np.asarray(sample(params, prompts, keys, sampling.SamplingParams()).lengths_B)

    def batches() -> np.ndarray:
        cuts = [slice(start, start + rows) for start in range(0, len(prompts), rows)]
        done = [sample(params, prompts[cut], keys[cut], sampling.SamplingParams()) for cut in cuts]
        return np.concatenate([np.asarray(out.lengths_B) for out in done])

    seconds = {way: fastest(way, repeats) for way in (continuous, batches)}
    lengths = continuous()
    assert np.array_equal(lengths, batches())
    return {
        "device": jax.devices()[0].device_kind,
        "prompts": len(prompts),
        "mean_length": round(float(lengths.mean()), 1),
        "seconds": round(seconds[continuous], 4),
        "batches_seconds": round(seconds[batches], 4),
        "ratio": round(seconds[batches] / seconds[continuous], 3),
        "tokens_per_second": round(float(lengths.sum()) / seconds[continuous], 1),
    }


def run_torch(case: Case, drawing: sampling.SamplingParams, repeats: int) -> dict[str, Any]:
    """transformers' generate on the same shape, with the faster attention."""
    import torch
    import transformers

    model = case.model
    ours = {"yarn", "compute_dtype", "attention", "remat", "rope_theta"}
    shared = dataclasses.asdict(model).items()
    hf_config = transformers.Qwen3Config(
        **{name: value for name, value in shared if name not in ours},
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
    )
    network = transformers.Qwen3ForCausalLM(hf_config).eval()
    inputs = torch.from_numpy(random_prompts(case).astype(np.int64))
    generation = transformers.GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=drawing.top_p,
        top_k=drawing.top_k,
        max_new_tokens=case.new,
        pad_token_id=0,
        eos_token_id=None,
    )

    def call() -> None:
        with torch.inference_mode():
            out = network.generate(
                inputs, attention_mask=torch.ones_like(inputs), generation_config=generation
            )
        assert out.shape == (case.batch, case.prompt + case.new)

    seconds = {}
    for attention in ("eager", "sdpa"):
        network.set_attn_implementation(attention)
        seconds[attention] = fastest(call, repeats)
    best = min(seconds, key=lambda attention: seconds[attention])
    return {
        "device": f"cpu, {torch.get_num_threads()} threads",
        "attention": best,
    } | speed(case, seconds[best])


class _Numbers:
    """What Tunix asks of a tokenizer, for prompts that are written as numbers."""

    def encode(self, text: str) -> list[int]:
        return [int(number) for number in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        return -1  # no token

    def pad_id(self) -> int:
        return 0


def run_tunix(case: Case, drawing: sampling.SamplingParams, repeats: int) -> dict[str, Any]:
    """google-tunix's Sampler and Qwen3 (of its version 0.1.7) on the same shape."""
    from flax import nnx

    network = importlib.import_module("tunix.models.qwen3.model")
    library = importlib.import_module("tunix.generate.sampler")
    model = case.model
    shape = network.ModelConfig(
        num_layers=model.num_hidden_layers,
        vocab_size=model.vocab_size,
        embed_dim=model.hidden_size,
        hidden_dim=model.intermediate_size,
        num_heads=model.num_attention_heads,
        head_dim=model.head_dim,
        num_kv_heads=model.num_key_value_heads,
        rope_theta=int(model.rope_theta),
        norm_eps=model.rms_norm_eps,
        use_tied_embedding=model.tie_word_embeddings,
    )
    cache = library.CacheConfig(
        cache_size=case.prompt + case.new,
        num_layers=model.num_hidden_layers,
        num_kv_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
    )
    sample = library.Sampler(network.Qwen3(shape, rngs=nnx.Rngs(0)), _Numbers(), cache)
    prompts = [" ".join(map(str, row)) for row in random_prompts(case)]

    def call() -> None:
        out = sample(
            prompts,
            max_generation_steps=case.new,
            max_prompt_length=case.prompt,
            eos_tokens=[model.vocab_size],  # no token
            temperature=1.0,
            top_p=drawing.top_p,  # without it, decoding is greedy
            top_k=drawing.top_k or None,
            seed=0,
        )
        assert len(out.tokens) == case.batch

    seconds = fastest(call, repeats)
    return {"device": jax.devices()[0].device_kind} | speed(case, seconds)


RUNS = {"opsdc": run_opsdc, "torch": run_torch, "tunix": run_tunix}

if __name__ == "__main__":
    sys.exit(cli.run(main))
