"""Trains a model with OPSDC: python scripts/train.py --config configs/tiny.py [--workdir DIR]

Any key of the configuration can be overridden: --config.train.steps=20. The keys, their defaults
and units are in opsdc_jax/config.py. A workdir with an unfinished run of the same configuration is
continued; with a finished one its table is printed.

Exit codes: 0 done; 1 an unexpected error (with a traceback); 2 bad input (one sentence says what
to change, before anything is compiled).
"""

import dataclasses
import math
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from opsdc_jax import checkpoint, cli, config, data, distill, evaluate, report, rollout, sharding
from opsdc_jax.data import Example
from opsdc_jax.files import read_json, write_json
from opsdc_jax.metrics import CompileCounter, MetricsFile, read_metrics
from opsdc_jax.models import hf, qwen3, weights
from opsdc_jax.models.qwen3 import Qwen3Config
from opsdc_jax.progress import Progress
from opsdc_jax.prompts import Prompts
from opsdc_jax.sampler import TRAIN_STREAM, Sampler, SamplingParams, sequence_keys
from opsdc_jax.workdir import Workdir, beside_finished, is_finished


class Parts(NamedTuple):
    """Everything a run is made of, ready before the first compilation.

    Attributes:
      folder: of the base model, its files checked, its weights not read yet.
      examples: the evaluation problems.
      sampler, eval_sampler: for training rollouts and for evaluation.
    """

    mesh: Mesh
    model: Qwen3Config
    shardings: qwen3.Params
    folder: pathlib.Path
    tokenizer: Any
    prompts: Prompts
    source: data.Source
    examples: list[Example]
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
    path = args.workdir or f"runs/{cli.config_name(argv)}"
    workdir = Workdir(beside_finished(path) if args.new_if_finished else path, args.config)
    if not is_finished(workdir.path):
        parts = prepare(args.config)
        workdir.create()
        cli.use_compilation_cache()
        describe(args.config, parts, workdir)
        train(args.config, parts, workdir)
    summary = read_json(workdir.summary)
    print(f"\n{report.table(summary)}")
    if summary:
        print(f"\n{report.verdict(summary)}")
    print(f"\neverything is in {workdir.path}")
    return cli.EXIT_DONE


def prepare(settings: ConfigDict) -> Parts:
    """Reads and checks all inputs; compiles nothing.

    Raises:
      InputError: an input that cannot work, with what to change.
    """
    folder = hf.resolve_folder(settings.model.path)
    model = hf.load_config(folder, settings.model.compute_dtype, settings.model.remat)
    tokenizer = hf.load_tokenizer(folder)
    hf.check_vocabulary(tokenizer, model)
    mesh = sharding.make_mesh(settings.mesh)
    shardings = qwen3.shardings(model, mesh)
    keys = ["train.micro_batch_size", "train.batch_size"]
    keys += ["eval.batch_size"] if settings.eval.source != "none" else []
    for key in keys:
        sharding.check_divides(mesh, key, config.get(settings, key))
    prompts = Prompts(tokenizer, **settings.prompts)
    source, examples = open_data(settings, prompts)
    sampler = Sampler(
        model=model,
        prompt_buckets=rollout.length_buckets(settings.sampler.max_prompt_tokens),
        response_width=settings.sampler.max_response_tokens,
        vocab_size=len(tokenizer),
        stop_ids=hf.stop_token_ids(folder, tokenizer),
        pad_id=tokenizer.pad_token_id,
        rows=sharding.batch_sharding(mesh),
    )
    eval_sampler = dataclasses.replace(sampler, response_width=settings.eval.max_response_tokens)
    check_budgets(prompts, [*examples, *source.train(1, 256)], sampler, eval_sampler)
    weights.check_files(folder, model)
    return Parts(
        mesh, model, shardings, folder, tokenizer, prompts, source, examples, sampler, eval_sampler
    )


def open_data(settings: ConfigDict, prompts: Prompts) -> tuple[data.Source, list[Example]]:
    """The training source and the evaluation problems; what is left out of them is printed."""

    def accept(example: Example) -> str | None:
        return prompts.rejection(example.problem, settings.sampler.max_prompt_tokens)

    source = data.open_source(seed=settings.seed, accept=accept, **settings.data)
    print(source.report)
    benchmark = settings.eval.source
    if benchmark == "none":
        return source, []
    if not benchmark:
        return source, source.evaluation(settings.eval.samples_per_level)
    keys = ("limit", "split", "subset", "problem_column", "answer_column", "level_column")
    examples, read = data.evaluation_examples(
        benchmark, settings.seed, accept=accept, **{key: settings.eval[key] for key in keys}
    )
    print(read)
    return source, examples


def check_budgets(
    prompts: Prompts, examples: Sequence[Example], sampler: Sampler, eval_sampler: Sampler
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
    for key, user in (("sampler", sampler), ("eval", eval_sampler)):
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
    axes = " ".join(f"{axis}={size}" for axis, size in parts.mesh.shape.items())
    teacher = (
        f"refreshed every {settings.teacher.every} steps" if settings.teacher.every else "frozen"
    )
    print(
        f"model    {settings.model.path}: {size / 1e6:,.2f} M parameters, "
        f"{parts.model.num_hidden_layers} layers, {settings.model.compute_dtype}\n"
        f"teacher  the same weights under instruction {settings.prompts.instruction!r}, {teacher}\n"
        f"devices  {jax.device_count()} x {jax.devices()[0].device_kind}; mesh {axes}\n"
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


def train(settings: ConfigDict, parts: Parts, workdir: Workdir) -> None:
    """THE loop: sample, pair, accumulate, apply; teacher, checkpoints and evaluations on time."""
    compilations = CompileCounter()
    jitted = distill.make_train_step(
        parts.model,
        distill.make_optimizer(settings.optim),
        divergence=settings.loss.divergence,
        chunk_tokens=settings.loss.chunk_tokens,
        vocab_size=len(parts.tokenizer),
        shardings=parts.shardings,
        teacher_dtype=settings.model.teacher_dtype,
    )
    sampling = SamplingParams(
        settings.sampler.temperature, settings.sampler.top_p, settings.sampler.top_k
    )
    rows = sharding.batch_sharding(parts.mesh)
    response_buckets = rollout.length_buckets(settings.sampler.max_response_tokens)
    batch_size, last_step = settings.train.batch_size, settings.train.steps

    def evaluated(name: str, params: qwen3.Params, render: Callable[[str], list[int]]) -> None:
        evaluate_once(settings, parts, workdir, name, params, render)

    with checkpoint.Checkpointer(workdir.checkpoints, settings.checkpoint.keep) as checkpoints:
        first_step = checkpoints.latest_step() or 0
        if first_step:
            state = checkpoints.restore(first_step, like=jitted.like)
            print(f"continuing after step {first_step}")
            if due(first_step, settings.eval.every, last_step):  # it may have died before that
                evaluated(student_name(first_step), state.student, parts.prompts.student)
        else:
            state = jitted.init(
                weights.load_params(parts.folder, parts.model, shardings=parts.shardings)
            )
            evaluated("base", state.student, parts.prompts.student)
            evaluated("concise_prompt", state.student, parts.prompts.teacher)

        with MetricsFile(workdir.metrics, last_step=first_step) as metrics_file:
            progress = Progress(metrics_file, last_step)
            for step in range(first_step + 1, last_step + 1):
                examples = parts.source.train(step, batch_size)
                student_prompts = [parts.prompts.student(e.problem) for e in examples]
                teacher_prompts = [parts.prompts.teacher(e.problem) for e in examples]
                keys = sequence_keys(settings.seed, TRAIN_STREAM, step, np.arange(batch_size))
                sampled = parts.sampler(state.student, student_prompts, keys, sampling)
                progress.print_pending()  # the last step's metrics, while this step's rollout runs
                sampled = jax.device_get(sampled)

                accumulator = jitted.zeros(state.student)
                for micro_batch in rollout.micro_batches(
                    sampled,
                    student_prompts,
                    teacher_prompts,
                    micro_batch_size=settings.train.micro_batch_size,
                    prompt_buckets=parts.sampler.prompt_buckets,
                    response_buckets=response_buckets,
                    pad_id=parts.tokenizer.pad_token_id,
                ):
                    accumulator = jitted.accumulate(
                        state.student,
                        state.teacher,
                        accumulator,
                        jax.device_put(micro_batch, rows),
                    )
                state, metrics = jitted.apply(state, accumulator)
                del accumulator  # a gradient's memory, through the next rollout
                if distill.refresh_due(step, settings.teacher.every):
                    teacher = jitted.refresh(state.student, state.teacher)
                    state = dataclasses.replace(state, teacher=teacher)

                progress.add(step, metrics, sampled, compilations.count)
                if due(step, settings.log.samples_every, last_step):
                    write_samples(workdir, step, examples, sampled, parts, settings.log.samples)
                if due(step, settings.checkpoint.every_steps, last_step):
                    progress.print_pending()  # a saved step must not miss in metrics.jsonl
                    checkpoints.save(state, step)
                if due(step, settings.eval.every, last_step):
                    progress.print_pending()
                    evaluated(student_name(step), state.student, parts.prompts.student)
                    progress.restart_clock()
    print(compilations)
    finish(settings, workdir)


def student_name(step: int) -> str:
    """Name of the student's evaluation after a step."""
    return f"student-{step:06d}"


def due(step: int, every: int, last_step: int) -> bool:
    """True every `every` steps (0: never), and at the last."""
    return step == last_step or (every > 0 and step % every == 0)


def write_samples(
    workdir: Workdir,
    step: int,
    examples: Sequence[Example],
    sampled: rollout.Rollout,
    parts: Parts,
    count: int,
) -> None:
    """The first `count` rollouts of a step, ids and text, to samples/step-N.json."""
    rows = []
    for row, example in enumerate(examples[:count]):
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


def evaluate_once(
    settings: ConfigDict,
    parts: Parts,
    workdir: Workdir,
    name: str,
    params: qwen3.Params,
    render: Callable[[str], list[int]],
) -> None:
    """Evaluates one system into eval/NAME.json, unless that file is there or evaluation is off."""
    path = workdir.eval / f"{name}.json"
    if path.exists() or not parts.examples:
        return
    began = time.perf_counter()
    answers = evaluate.answer_all(
        params,
        parts.eval_sampler,
        parts.tokenizer,
        parts.examples,
        [render(example.problem) for example in parts.examples],
        sampling=SamplingParams(
            settings.eval.temperature, settings.eval.top_p, settings.eval.top_k
        ),
        seed=settings.seed,
        batch_size=settings.eval.batch_size,
    )
    summary = evaluate.summarise(answers)
    write_json(path, {"summary": summary, "answers": [answer._asdict() for answer in answers]})
    overall = summary["overall"]
    print(
        f"evaluated {name}: accuracy {100 * overall['accuracy']:.1f}%, "
        f"{overall['tokens']:.1f} tokens ({time.perf_counter() - began:.0f} s)",
        flush=True,
    )


def finish(settings: ConfigDict, workdir: Workdir) -> None:
    """Plots, and the summary whose presence marks the run as finished."""
    summaries = {path.stem: read_json(path)["summary"] for path in workdir.eval.glob("*.json")}
    students = {
        step: summaries[student_name(step)]
        for step in range(1, settings.train.steps + 1)
        if student_name(step) in summaries
    }
    curve = list(students.items())
    if summaries:
        curve.insert(0, (0, summaries["base"]))
        summaries["student"] = students[settings.train.steps]
    report.plot(
        workdir.plots,
        read_metrics(workdir.metrics),
        curve,
        summaries.get("concise_prompt"),
        settings.teacher.every,
    )
    write_json(
        workdir.summary,
        {name: summaries[name] for name in report.SYSTEM_NAMES if name in summaries},
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
