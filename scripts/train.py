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
import sys
import time
from collections.abc import Sequence

import jax
from absl import flags
from ml_collections import ConfigDict

from opsdc_jax import (
    checkpoint,
    cli,
    config,
    distill,
    distributed,
    report,
    results,
    rollout,
    sharding,
    startup,
)
from opsdc_jax.evaluate import Evaluator, System
from opsdc_jax.files import read_json, write_json
from opsdc_jax.metrics import CompileCounter, MetricsFile, check_mirrors, open_mirrors
from opsdc_jax.models import weights
from opsdc_jax.parts import Parts, batch_of, describe, prepare
from opsdc_jax.progress import Progress
from opsdc_jax.samples import SampleWriter
from opsdc_jax.sampling import SamplingParams
from opsdc_jax.summary import summarise
from opsdc_jax.workdir import Workdir, beside_finished, is_finished


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
        describe(args.config, parts, workdir.path)
        if not train(args.config, parts, workdir):
            return cli.EXIT_STOPPED
    if distributed.is_first():
        print(f"\n{report.tables(read_json(workdir.summary))}")
        print(f"\n{report.write(workdir.path)}\neverything is in {workdir.path}")
    distributed.wait_for_all("the report is written")
    return cli.EXIT_DONE


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
    writer = SampleWriter.of_run(settings, parts, workdir.samples)
    sampling = SamplingParams(
        settings.sampler.temperature, settings.sampler.top_p, settings.sampler.top_k
    )
    last_step = settings.train.steps
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
        asked = batch_of(settings, parts, first_step + 1)
        with startup.compiling_ahead(startup.programs_of(settings, parts, jitted, asked)):
            began = time.perf_counter()
            for system in systems:
                if not evaluator.run(system, state.student, stop_asked):
                    return stopped(first_step)

        print(startup.report(first_step + 1, time.perf_counter() - began), flush=True)
        progress.restart_clock()
        for step in range(first_step + 1, last_step + 1):
            if stop_asked():
                progress.print_pending()
                checkpoints.save(state, step - 1)
                return stopped(step - 1)
            with sharding.explicit_transfers():
                sampled = parts.sampler(
                    state.student, asked.student_prompts, asked.keys_B, sampling
                )
                progress.print_pending()  # the last step's metrics, while this step's rollout runs
                sampled = jax.device_get(sampled)
                kept = None
                if step == 1 or due(step, settings.log.samples_every, last_step):
                    # Before the update: by the very student that sampled, and its teacher.
                    kept = writer.start(step, state.student, state.teacher, asked, sampled)

                micro_batches = rollout.micro_batches(
                    sampled,
                    asked.student_prompts,
                    asked.teacher_prompts,
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
                # The device is busy with the update: the host's time to ask, and to write.
                asked = batch_of(settings, parts, step + 1)
                if kept:
                    writer.finish(kept)

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


if __name__ == "__main__":
    sys.exit(cli.run(main))
