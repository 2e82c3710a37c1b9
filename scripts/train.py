"""Trains a model with OPSDC: python scripts/train.py --config configs/tiny.py [--workdir DIR]

Any key of the configuration can be overridden: --config.train.steps=20. The keys, their defaults
and units are in opsdc_jax/config.py. A workdir with an unfinished run of the same configuration is
continued; with a finished one its table is printed.

Several hosts run the same command each, see docs/launch.md. SIGTERM to any of them stops the run
after its step, with a checkpoint.

Exit codes: 0 done; 1 an unexpected error (with a traceback); 2 bad input (one sentence says what
to change, before anything is compiled); 3 stopped when asked to, the same command continues.
"""

import contextlib
import dataclasses
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from opsdc_jax import (
    checkpoint,
    cli,
    config,
    data,
    distill,
    distributed,
    report,
    results,
    rollout,
    sharding,
    token_view,
)
from opsdc_jax.benchmarks import Benchmark, open_benchmarks
from opsdc_jax.data import Example
from opsdc_jax.evaluate import Evaluator, System
from opsdc_jax.files import fingerprint, read_json, write_json, write_json_lines
from opsdc_jax.metrics import CompileCounter, MetricsFile, check_mirrors, open_mirrors
from opsdc_jax.models import hf, qwen3, weights
from opsdc_jax.models.qwen3 import Qwen3Config
from opsdc_jax.progress import Progress
from opsdc_jax.prompts import Prompts
from opsdc_jax.sampler import TRAIN_STREAM, Sampler, SamplingParams, decode_mesh, sequence_keys
from opsdc_jax.summary import summarise
from opsdc_jax.token_view import TokenViewer
from opsdc_jax.workdir import Workdir, beside_finished, is_finished


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


def main(argv: Sequence[str]) -> int:
    """Parses, checks, trains, prints the final table."""
    values = cli.config_flag_values(argv)
    flags.DEFINE_string("workdir", None, "folder of the run; runs/<config>", flag_values=values)
    flags.DEFINE_bool(
        "new_if_finished",
        False,
        "take DIR-2, DIR-3, ... if the run is finished",
        flag_values=values,
    )
    args = cli.parse(values, argv)
    config.validate(args.config)
    check_mirrors(args.config.log)
    distributed.initialize()
    path = args.workdir or f"runs/{cli.config_name(argv)}"
    workdir = Workdir(beside_finished(path) if args.new_if_finished else path, args.config)
    if not is_finished(workdir.path):
        parts = prepare(args.config)
        distributed.first_does(workdir.create)
        cli.use_compilation_cache()
        describe(args.config, parts, workdir)
        if not train(args.config, parts, workdir):
            return cli.EXIT_STOPPED
    if distributed.is_first():
        print(f"\n{report.tables(read_json(workdir.summary))}")
        print(f"\n{report.write(workdir.path)}\neverything is in {workdir.path}")
    distributed.wait_for_all("the report is written")
    return cli.EXIT_DONE


def prepare(settings: ConfigDict) -> Parts:
    """Reads and checks all inputs; compiles nothing.

    Raises:
      InputError: an input that cannot work, with what to change.
    """
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
    keys = ["sampler.slots" if settings.sampler.slots else "train.batch_size"]
    keys += ["eval.batch_size"] if settings.eval.source != "none" else []
    for key in keys:
        sharding.check_divides(decoding, key, config.get(settings, key))
    prompts = Prompts(tokenizer, **settings.prompts)
    source, benchmarks = open_data(settings, prompts)
    sampler = Sampler(
        model=model,
        mesh=decoding,
        prompt_buckets=rollout.length_buckets(settings.sampler.max_prompt_tokens),
        response_width=settings.sampler.max_response_tokens,
        vocab_size=len(tokenizer),
        stop_ids=hf.stop_token_ids(folder, tokenizer),
        pad_id=tokenizer.pad_token_id,
        slots=settings.sampler.slots,
    )
    eval_sampler = dataclasses.replace(
        sampler, response_width=settings.eval.max_response_tokens, slots=0
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

    source = data.open_source(seed=settings.seed, accept=accept, **settings.data)
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


def describe(settings: ConfigDict, parts: Parts, workdir: Workdir) -> None:
    """Prints what the run will do."""
    leaves = jax.tree.leaves(qwen3.abstract_params(parts.model))
    size = sum(math.prod(leaf.shape) for leaf in leaves)
    axes, decoding = (
        " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        for mesh in (parts.mesh, parts.sampler.mesh)
    )
    teacher = (
        f"refreshed every {settings.teacher.every} steps" if settings.teacher.every else "frozen"
    )
    print(
        f"model    {settings.model.path}: {size / 1e6:,.2f} M parameters, "
        f"{parts.model.num_hidden_layers} layers, {settings.model.compute_dtype}\n"
        f"teacher  the same weights under instruction {settings.prompts.instruction!r}, {teacher}\n"
        f"devices  {jax.device_count()} x {jax.devices()[0].device_kind}; mesh {axes}; "
        f"decoding {decoding}\n"
        f"train    {settings.train.steps} steps of {settings.train.batch_size} rollouts "
        f"(micro-batches of {settings.train.micro_batch_size}), at most "
        f"{settings.sampler.max_response_tokens} tokens each; {settings.loss.divergence}\n"
        f"workdir  {workdir.path}"
    )
    example = parts.source.train(1, settings.train.batch_size)[0]
    for side, ids in (
        ("student", parts.prompts.student(example.problem)),
        ("teacher", parts.prompts.teacher(example.problem)),
    ):
        text = parts.tokenizer.decode(ids)
        print(f"{side} prompt, {len(ids)} tokens:\n    {text}".replace("\n", "\n    "))


def train(settings: ConfigDict, parts: Parts, workdir: Workdir) -> bool:
    """THE loop: sample, pair, accumulate, apply; teacher, checkpoints and evaluations on time.

    Returns:
      False if it was asked to stop before the last step.
    """
    compilations = CompileCounter()
    jitted = distill.make_train_step(
        parts.model,
        distill.make_optimizer(settings.optim),
        divergence=settings.loss.divergence,
        chunk_tokens=settings.loss.chunk_tokens,
        vocab_size=len(parts.tokenizer),
        shardings=parts.shardings,
        teacher_dtype=settings.model.teacher_dtype,
        offload_optimizer=settings.optim.offload,
    )
    rows = sharding.batch_sharding(parts.mesh)
    viewer = token_viewer(settings, parts)
    sampling = SamplingParams(
        settings.sampler.temperature, settings.sampler.top_p, settings.sampler.top_k
    )
    batch_size, last_step = settings.train.batch_size, settings.train.steps
    longest = settings.sampler.max_prompt_tokens + settings.sampler.max_response_tokens

    evaluator = Evaluator(
        settings,
        parts.benchmarks,
        parts.prompts,
        parts.tokenizer,
        parts.eval_sampler,
        workdir.eval,
    )

    with contextlib.ExitStack() as stack:
        stop_asked = stack.enter_context(distributed.stop_requests())
        checkpoints = stack.enter_context(
            checkpoint.Checkpointer(workdir.checkpoints, settings.checkpoint.keep)
        )
        first_step = distributed.from_first(checkpoints.latest_step() or 0)
        metrics_file = None
        if distributed.is_first():
            results.remove_later_students(workdir.eval, first_step)
            mirrors = open_mirrors(workdir.path, settings, first_step)
            metrics_file = stack.enter_context(MetricsFile(workdir.metrics, first_step, mirrors))
        progress = Progress(metrics_file, last_step)

        if first_step:
            state = checkpoints.restore(first_step, like=jitted.like)
            print(f"continuing after step {first_step}")
            again = due(first_step, settings.eval.every, last_step)  # it may have died before that
            systems = [student(settings, first_step)] if again else []
        else:
            state = jitted.init(
                weights.load_params(parts.folder, parts.model, shardings=parts.shardings)
            )
            systems = [
                System(name, settings.model.path, parts.weights, concise)
                for name, concise in ((results.BASE, False), (results.CONCISE, True))
            ]
        for system in systems:
            if not evaluator.run(system, state.student, stop_asked):
                return stopped(first_step)

        progress.restart_clock()
        for step in range(first_step + 1, last_step + 1):
            if stop_asked():
                progress.print_pending()
                checkpoints.save(state, step - 1)
                return stopped(step - 1)
            with sharding.explicit_transfers():
                examples = parts.source.train(step, batch_size)
                student_prompts = [parts.prompts.student(e.problem) for e in examples]
                teacher_prompts = [parts.prompts.teacher(e.problem) for e in examples]
                keys = sequence_keys(settings.seed, TRAIN_STREAM, step, np.arange(batch_size))
                sampled = parts.sampler(state.student, student_prompts, keys, sampling)
                progress.print_pending()  # the last step's metrics, while this step's rollout runs
                sampled = jax.device_get(sampled)
                if step == 1 or due(step, settings.log.samples_every, last_step):
                    # Before the update: by the very student that sampled, and its teacher.
                    views = viewer(
                        state.student,
                        state.teacher,
                        sampled,
                        student_prompts,
                        teacher_prompts,
                        settings.log.token_views,
                    )
                    if distributed.is_first():
                        write_samples(workdir, step, examples, sampled, views, parts, settings)

                micro_batches = rollout.micro_batches(
                    sampled,
                    student_prompts,
                    teacher_prompts,
                    micro_batch_size=settings.train.micro_batch_size,
                    longest=longest,
                    pad_id=parts.tokenizer.pad_token_id,
                )
                batches = (sharding.place(batch, rows) for batch in micro_batches)
                if len(micro_batches) == 1:
                    accumulator = jitted.single(state.student, state.teacher, *batches)
                else:
                    accumulator = jitted.zeros(state.student)
                    for batch in batches:
                        accumulator = jitted.accumulate(
                            state.student, state.teacher, accumulator, batch
                        )
                state, metrics = jitted.apply(state, accumulator)
                del accumulator  # a gradient's memory, through the next rollout
                if distill.refresh_due(step, settings.teacher.every):
                    teacher = jitted.refresh(state.student, state.teacher)
                    state = dataclasses.replace(state, teacher=teacher)

            metrics["padding_efficiency"] = rollout.padding_efficiency(micro_batches)
            progress.add(step, metrics, sampled, compilations.count)
            evaluation_due = due(step, settings.eval.every, last_step)
            # Also before an evaluation: it may take longer than a machine is granted.
            if evaluation_due or due(step, settings.checkpoint.every_steps, last_step):
                progress.print_pending()  # a saved step must not miss in metrics.jsonl
                checkpoints.save(state, step)
            if evaluation_due:
                if not evaluator.run(student(settings, step), state.student, stop_asked):
                    return stopped(step)
                progress.restart_clock()
    print(compilations)
    if distributed.is_first():
        write_json(workdir.summary, summarise(workdir.eval))  # marks the run as finished
    return True


def stopped(step: int) -> bool:
    """What a run that was asked to stop says, and returns."""
    print(f"stopped after step {step}: the same command continues")
    return False


def student(settings: ConfigDict, step: int) -> System:
    """The student after a step, as a system to evaluate."""
    return System(results.student_name(step), settings.model.path, f"step {step}")


def due(step: int, every: int, last_step: int) -> bool:
    """True every `every` steps (0: never), and at the last."""
    return step == last_step or (every > 0 and step % every == 0)


def token_viewer(settings: ConfigDict, parts: Parts) -> TokenViewer:
    """Compares rollouts token by token, at the widths of the budgets: one program for all steps."""
    return TokenViewer(
        compare=token_view.make_compare(
            parts.model,
            vocab_size=len(parts.tokenizer),
            shardings=parts.shardings,
        ),
        tokenizer=parts.tokenizer,
        rows=sharding.batch_sharding(parts.mesh),
        rows_at_a_time=settings.train.micro_batch_size,
        prompt_width=settings.sampler.max_prompt_tokens,
        response_width=settings.sampler.max_response_tokens,
        pad_id=parts.tokenizer.pad_token_id,
    )


def write_samples(
    workdir: Workdir,
    step: int,
    examples: Sequence[Example],
    sampled: rollout.Rollout,
    views: Sequence[dict[str, Any]],
    parts: Parts,
    settings: ConfigDict,
) -> None:
    """The first rollouts of a step: ids and text to samples/step-N.json, views to tokens-N.json."""
    rows = []
    for row, example in enumerate(examples[: settings.log.samples]):
        ids = sampled.tokens_BxR[row, : sampled.lengths_B[row]].tolist()
        rows.append(
            {
                **example._asdict(),
                "stopped": bool(sampled.stopped_B[row]),
                "text": parts.tokenizer.decode(ids),
                "ids": ids,
            }
        )
    write_json(workdir.samples / f"step-{step:06d}.json", rows)
    if views:
        rows = [
            {**example._asdict(), "stopped": bool(stopped), **view}
            for example, stopped, view in zip(examples, sampled.stopped_B, views, strict=False)
        ]
        write_json_lines(workdir.samples / f"tokens-{step:06d}.jsonl", rows)


if __name__ == "__main__":
    sys.exit(cli.run(main))
