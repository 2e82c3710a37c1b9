"""Everything a training run is made of, read and checked before the first compilation."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from opsdc_jax import config, continuous, data, rollout, sharding
from opsdc_jax.benchmarks import Benchmark, open_benchmarks
from opsdc_jax.data import Example
from opsdc_jax.files import fingerprint
from opsdc_jax.models import hf, qwen3, weights
from opsdc_jax.models.layers import Qwen3Config
from opsdc_jax.prompts import Prompts
from opsdc_jax.rewards import needs_answers
from opsdc_jax.sampler import Sampler, decode_mesh
from opsdc_jax.sampling import TRAIN_STREAM, sequence_keys


class Parts(NamedTuple):
    """Everything a run is made of, ready before the first compilation.

    Attributes:
      folder: of the base model, its files checked, its weights not read yet.
      weights: digest of these.
      benchmarks: the evaluation problems; empty where evaluation is off.
      sampler, eval_sampler: for training rollouts and for evaluation.
    """

    mesh: Mesh
    model: Qwen3Config
    shardings: qwen3.Params
    folder: pathlib.Path
    weights: str
    tokenizer: Any
    prompts: Prompts
    source: data.Source
    benchmarks: list[Benchmark]
    sampler: Sampler
    eval_sampler: Sampler


class Batch(NamedTuple):
    """What a step asks its student.

    Attributes:
      student_prompts, teacher_prompts: token ids, of either side.
      keys_B: one random key for each rollout.
    """

    examples: Sequence[Example]
    student_prompts: list[list[int]]
    teacher_prompts: list[list[int]]
    keys_B: jax.Array


def batch_of(settings: ConfigDict, parts: Parts, step: int) -> Batch:
    """The batch of a step: a pure function of the configuration and the step."""
    size = settings.train.batch_size
    examples = parts.source.train(step, size)
    return Batch(
        examples=examples,
        student_prompts=[parts.prompts.student(example.problem) for example in examples],
        teacher_prompts=[parts.prompts.teacher(example.problem) for example in examples],
        keys_B=sequence_keys(settings.seed, TRAIN_STREAM, step, np.arange(size)),
    )


def prepare(settings: ConfigDict) -> Parts:
    """Reads and checks all inputs; compiles nothing.

    Raises:
      InputError: an input that cannot work, with what to change.
    """
    reused = settings.eval.reuse
    if reused and not (pathlib.Path(reused) / "eval").is_dir():
        raise config.InputError(
            f"eval.reuse={reused!r} is no folder of a run: it holds no eval/, so leave it empty"
        )
    folder = hf.resolve_folder(settings.model.path)
    model = hf.load_config(
        folder, settings.model.compute_dtype, settings.model.remat, settings.model.attention
    )
    tokenizer = hf.load_tokenizer(folder)
    hf.check_vocabulary(tokenizer, model)
    mesh = sharding.make_mesh(settings.mesh)
    shardings = qwen3.shardings(model, mesh)
    decoding = decode_mesh(model, mesh, settings.mesh.decode_tensor)
    sharding.check_divides(mesh, "train.micro_batch_size", settings.train.micro_batch_size)
    refilled = continuous.refilled(settings.sampler.slots, settings.train.batch_size)
    keys = ["sampler.slots" if refilled else "train.batch_size"]
    keys += ["eval.batch_size"] if settings.eval.source != "none" else []
    for key in keys:
        sharding.check_divides(decoding, key, config.get(settings, key))
    prompts = Prompts(tokenizer, **settings.prompts)
    stop_ids = hf.stop_token_ids(folder, tokenizer)
    prompts.check_stop_ids(stop_ids)
    source, benchmarks = open_data(settings, prompts)
    sampler = Sampler(
        model=model,
        mesh=decoding,
        prompt_buckets=rollout.length_buckets(settings.sampler.max_prompt_tokens),
        response_width=settings.sampler.max_response_tokens,
        vocab_size=len(tokenizer),
        stop_ids=stop_ids,
        pad_id=tokenizer.pad_token_id,
        slots=settings.sampler.slots if refilled else 0,
    )
    eval_sampler = dataclasses.replace(
        sampler,
        response_width=settings.eval.max_response_tokens,
        slots=settings.eval.batch_size,
    )
    examples = [example for benchmark in benchmarks for example in benchmark.examples]
    training = source.train(1, 256)
    check_budgets(prompts, [*examples, *training], sampler, eval_sampler, bool(benchmarks))
    files = weights.check_files(folder, model)
    return Parts(
        mesh=mesh,
        model=model,
        shardings=shardings,
        folder=folder,
        weights=fingerprint(folder / file for file in files),
        tokenizer=tokenizer,
        prompts=prompts,
        source=source,
        benchmarks=benchmarks,
        sampler=sampler,
        eval_sampler=eval_sampler,
    )


def open_data(settings: ConfigDict, prompts: Prompts) -> tuple[data.Source, list[Benchmark]]:
    """The training source and the benchmarks; what is left out of them is printed."""

    def accept(example: Example) -> str | None:
        return prompts.rejection(example.problem, settings.sampler.max_prompt_tokens)

    source = data.open_source(
        seed=settings.seed,
        accept=accept,
        need_answers=needs_answers(settings.loss),
        **settings.data,
    )
    columns = ("split", "subset", "problem_column", "answer_column", "level_column")
    benchmarks = open_benchmarks(
        settings.eval.source,
        settings.seed,
        limit=settings.eval.limit,
        samples_per_level=settings.eval.samples_per_level,
        table={key: settings.eval[key] for key in columns},
        accept=accept,
    )
    print("\n".join([source.report, *(benchmark.report for benchmark in benchmarks)]))
    return source, benchmarks


def check_budgets(
    prompts: Prompts,
    examples: Sequence[Example],
    sampler: Sampler,
    eval_sampler: Sampler,
    evaluated: bool,
) -> None:
    """Refuses budgets that cannot hold the prompts, or that the model was not made for."""
    sides = (prompts.student, prompts.teacher)
    longest = max(len(side(example.problem)) for example in examples for side in sides)
    prompt_limit = sampler.prompt_buckets[-1]
    if longest > prompt_limit:
        raise config.InputError(
            f"sampler.max_prompt_tokens={prompt_limit} cannot hold a prompt of {longest} "
            f"tokens: raise it to at least {longest}"
        )
    limit = sampler.model.max_position_embeddings
    users = {"sampler": sampler} | ({"eval": eval_sampler} if evaluated else {})
    for key, user in users.items():
        total = prompt_limit + user.response_width
        if total > limit:
            raise config.InputError(
                f"sampler.max_prompt_tokens + {key}.max_response_tokens = {total} exceeds the "
                f"model's {limit} positions: lower one of them"
            )


def describe(settings: ConfigDict, parts: Parts, workdir: pathlib.Path) -> None:
    """Prints what the run will do."""
    leaves = jax.tree.leaves(qwen3.abstract_params(parts.model))
    size = sum(math.prod(leaf.shape) for leaf in leaves)
    axes, decoding = (
        " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        for mesh in (parts.mesh, parts.sampler.mesh)
    )
    every, decay = settings.teacher.every, settings.teacher.decay
    teacher = f"refreshed every {every} steps" if every else "frozen"
    teacher += f", of which it keeps {decay}" if decay else ""
    print(
        f"model    {settings.model.path}: {size / 1e6:,.2f} M parameters, "
        f"{parts.model.num_hidden_layers} layers, {settings.model.compute_dtype}\n"
        f"teacher  the same weights under instruction {settings.prompts.instruction!r}, {teacher}\n"
        f"devices  {jax.device_count()} x {jax.devices()[0].device_kind}; mesh {axes}; "
        f"decoding {decoding}\n"
        f"train    {settings.train.steps} steps of {settings.train.batch_size} rollouts "
        f"(micro-batches of {settings.train.micro_batch_size}), at most "
        f"{settings.sampler.max_response_tokens} tokens each; {settings.loss.divergence}\n"
        f"workdir  {workdir}"
    )
    example = parts.source.train(1, settings.train.batch_size)[0]
    for side, ids in (
        ("student", parts.prompts.student(example.problem)),
        ("teacher", parts.prompts.teacher(example.problem)),
    ):
        text = parts.tokenizer.decode(ids)
        print(f"{side} prompt, {len(ids)} tokens:\n    {text}".replace("\n", "\n    "))
