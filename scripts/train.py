"""Trains a model with OPSDC: python scripts/train.py --config configs/tiny.py [--workdir DIR]

Any key of the configuration can be overridden: --config.train.steps=20. The keys, their defaults
and units are in opsdc_jax/config.py. A workdir with an unfinished run of the same configuration is
continued; with a finished one its table is printed.

Several hosts run the same command each, see docs/launch.md. SIGTERM or SIGINT (Ctrl-C) to any of
them stops the run after its step, with a checkpoint; another one, over a second later, ends that
process at once.

Exit codes: 0 done; 1 an unexpected error (with a traceback); 2 bad input, or a full or protected
disk (one sentence says what to change); 3 stopped when asked to, the same command continues;
4 stopped by a guard (one sentence says why, and names the last good checkpoint), the same command
stops again, unless with --config.guards.action=warn; 130, 143 ended by a second SIGINT, SIGTERM,
the same command continues from the last checkpoint.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence

from absl import flags
from ml_collections import ConfigDict

from opsdc_jax import (
    checkpoint,
    cli,
    config,
    distill,
    distributed,
    guards,
    report,
    results,
    rewards,
    rollout,
    samples,
    sharding,
    startup,
)
from opsdc_jax.evaluate import Evaluator, System
from opsdc_jax.files import read_json, write_json
from opsdc_jax.metrics import (
    CompileCounter,
    MetricsFile,
    check_mirrors,
    open_mirrors,
    read_metrics,
)
from opsdc_jax.models import weights
from opsdc_jax.parts import Parts, batch_of, describe, prepare
from opsdc_jax.progress import Progress
from opsdc_jax.samples import SampleWriter
from opsdc_jax.sampling import SamplingParams
from opsdc_jax.summary import best_student, summarise
from opsdc_jax.workdir import Workdir, beside_finished, is_finished


def main(argv: Sequence[str]) -> int:
    """Parses, checks, trains, prints the final table."""
    values = cli.config_flag_values(argv)
    flags.DEFINE_string("workdir", None, "folder of the run; runs/<config>", flag_values=values)
    flags.DEFINE_bool(
        "new_if_finished",
        False,
        "take DIR-2, DIR-3, ... if the run is finished; what it sampled of the base is taken over",
        flag_values=values,
    )
    args = cli.parse(values, argv)
    config.validate(args.config)
    check_mirrors(args.config.log)
    distributed.initialize()
    path = args.workdir or f"runs/{cli.config_name(argv)}"
    if args.new_if_finished:
        path, finished = beside_finished(path)
        if finished and not args.config.eval.reuse:
            args.config.eval.reuse = str(finished)
    workdir = Workdir(path, args.config)
    if not is_finished(workdir.path):
        with distributed.stop_requests() as stop_asked:
            parts = prepare(args.config)
            cli.use_compilation_cache()
            # Bad input that only another process sees leaves nothing behind either.
            distributed.wait_for_all("all inputs are good")
            distributed.first_does(workdir.create)
            describe(args.config, parts, workdir.path)
            warn(guards.risky_settings(args.config))
            try:
                if not train(args.config, parts, workdir, stop_asked):
                    return cli.EXIT_STOPPED
            except guards.GuardError as error:
                print(f"stopped by a guard: {error}", file=sys.stderr)
                return cli.EXIT_GUARD
    if distributed.is_first():
        summary = read_json(workdir.summary)
        results.check_summary(workdir.summary, summary)
        print(f"\n{report.tables(summary)}")
        print(f"\n{report.write(workdir.path)}\neverything is in {workdir.path}")
    distributed.wait_for_all("the report is written")
    return cli.EXIT_DONE


def train(
    settings: ConfigDict, parts: Parts, workdir: Workdir, stop_asked: Callable[[], bool]
) -> bool:
    """THE loop: sample, pair, accumulate, apply; teacher, checkpoints and evaluations on time.

    Args:
      stop_asked: whether any process was asked to stop; all call it together.

    Returns:
      False if it was asked to stop before the last step.

    Raises:
      GuardError: a guard stopped it.
    """
    compilations = CompileCounter()
    on_policy = settings.sampler.policy == "student"
    jitted = distill.make_train_step(
        parts.model,
        distill.make_optimizer(settings.optim),
        divergence=settings.loss.divergence,
        chunk_tokens=settings.loss.chunk_tokens,
        vocab_size=len(parts.tokenizer),
        shardings=parts.shardings,
        teacher_dtype=settings.model.teacher_dtype,
        top_k=settings.loss.top_k,
        teacher_decay=settings.teacher.decay,
        anchor=settings.loss.anchor,
        on_policy=on_policy,
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
        first_step = distributed.first_does(lambda: checkpoint.recover(workdir.checkpoints))
        distributed.first_does(lambda: remove_later(workdir, first_step))
        about = {"seed": settings.seed, "teacher_every": settings.teacher.every}
        checkpoints = stack.enter_context(
            checkpoint.Checkpointer(workdir.checkpoints, settings.checkpoint.keep, about)
        )
        metrics_file = None
        if distributed.is_first():
            mirrors = open_mirrors(workdir.path, settings, first_step)
            metrics_file = stack.enter_context(MetricsFile(workdir.metrics, first_step, mirrors))
        progress = Progress(metrics_file, last_step)
        done = [row for row in read_metrics(workdir.metrics) if row["step"] <= first_step]
        guard = guards.Guard(settings.guards, done, workdir.checkpoints, checkpoints.save)
        guard.check()

        if first_step:
            state = checkpoints.restore(first_step, like=jitted.like)
            print(f"continuing after step {first_step}{checkpoints.made_elsewhere(first_step)}")
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
        checkpoints.best = distributed.first_does(lambda: best_student(workdir.eval))
        if not first_step and distributed.is_first():
            warn(guards.short_budgets(workdir.eval, settings.eval.max_response_tokens))

        if first_step < last_step:
            print(startup.report(first_step + 1, time.perf_counter() - began), flush=True)
        progress.restart_clock()
        began = time.perf_counter()
        for step in range(first_step + 1, last_step + 1):
            checkpoints.check()
            if stop_asked():
                guard.add(progress.print_pending(), state)
                if step - 1 > first_step:
                    checkpoints.save(state, step - 1)
                return stopped(step - 1)
            with sharding.explicit_transfers():
                policy, prompts = state.student, asked.student_prompts
                if not on_policy:
                    policy, prompts = state.teacher, asked.teacher_prompts
                finish = parts.sampler.start(policy, prompts, asked.keys_B, sampling)
                # The last step's metrics, while this step's rollout runs.
                guard.add(progress.print_pending(), state)
                sampled = finish()
                kept = None
                if step == 1 or due(step, settings.log.samples_every, last_step):
                    # Before the update: by the very student that sampled, and its teacher.
                    kept = writer.start(step, state.student, state.teacher, asked, sampled)

                credit = rewards.credit(settings, parts.tokenizer, asked.examples, prompts, sampled)
                micro_batches = rollout.micro_batches(
                    sampled,
                    asked.student_prompts,
                    asked.teacher_prompts,
                    micro_batch_size=settings.train.micro_batch_size,
                    longest=longest,
                    pad_id=parts.tokenizer.pad_token_id,
                    weights=settings.loss.weights,
                    credit_B=credit.of_rows,
                )
                batches = (sharding.place(batch, rows) for batch in micro_batches)
                if len(micro_batches) == 1:
                    accumulator = jitted.single(state.student, state.teacher, *batches, state.base)
                else:
                    accumulator = jitted.zeros(state.student)
                    for batch in batches:
                        accumulator = jitted.accumulate(
                            state.student, state.teacher, accumulator, batch, state.base
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
            metrics |= credit.metrics
            progress.add(step, metrics, sampled, compilations.count)
            evaluation_due = due(step, settings.eval.every, last_step)
            save_due = due(step, settings.checkpoint.every_steps, last_step)
            save_due |= checkpoints.overdue(settings.checkpoint.every_minutes)
            # Also before an evaluation: it may take longer than a machine is granted.
            if evaluation_due or save_due:
                # A saved step must not miss in metrics.jsonl, and no trouble is saved.
                guard.add(progress.print_pending(), state)
                checkpoints.save(state, step)
            if evaluation_due:
                if not evaluator.run(student(settings, step), state.student, stop_asked):
                    return stopped(step)
                checkpoints.best = distributed.first_does(lambda: best_student(workdir.eval))
                progress.restart_clock()
        took = time.perf_counter() - began
    print(f"{compilations}\n{checkpoints.blocked(took)}")
    if distributed.is_first():
        write_json(workdir.summary, summarise(workdir.eval))  # marks the run as finished
    return True


def remove_later(workdir: Workdir, step: int) -> None:
    """Deletes what steps after `step` left: they are run again. metrics.jsonl is cut on opening."""
    results.remove_later_students(workdir.eval, step)
    samples.remove_later(workdir.samples, step)


def warn(sentences: Sequence[str]) -> None:
    """Prints each as a warning."""
    for sentence in sentences:
        print(f"warning: {sentence}", flush=True)


def stopped(step: int) -> bool:
    """What a run that was asked to stop says, and returns."""
    if step:
        print(f"stopped after step {step}: the same command continues")
    else:
        print("stopped before the first step: the same command starts again")
    return False


def student(settings: ConfigDict, step: int) -> System:
    """The student after a step, as a system to evaluate."""
    return System(results.student_name(step), settings.model.path, f"step {step}")


def due(step: int, every: int, last_step: int) -> bool:
    """True every `every` steps (0: never), and at the last."""
    return step == last_step or (every > 0 and step % every == 0)


if __name__ == "__main__":
    sys.exit(cli.run(main))
