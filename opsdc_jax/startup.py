"""Between a run's launch and its first step: how long it took, and what is compiled meanwhile."""

import contextlib
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from opsdc_jax import sharding
from opsdc_jax.distill import TrainStep
from opsdc_jax.parts import Batch, Parts
from opsdc_jax.rollout import DistillBatch, abstract_batches


def report(step: int, evaluating: float) -> str:
    """In words, how long the run took to its first step.

    Args:
      evaluating: seconds that systems were evaluated before it.
    """
    took = since_launch()
    after = "" if took is None else f" {took:.1f} s after launch"
    return f"step {step} begins{after}, evaluations before it took {evaluating:.1f} s"


def since_launch() -> float | None:
    """Seconds since this process was started, imports included; None where no /proc tells."""
    try:
        stat = pathlib.Path("/proc/self/stat").read_text(encoding="utf-8")
        ticks = int(stat.rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return None


def programs_of(
    settings: ConfigDict, parts: Parts, jitted: TrainStep, batch: Batch
) -> Iterable[Callable[[], Any]]:
    """The `step_programs` of a run; none where compiling them ahead is not worth it.

    Args:
      batch: any of the run's.
    """
    if not worth_compiling_ahead():
        return ()
    sampler, train = settings.sampler, settings.train
    batches = abstract_batches(
        batch.student_prompts,
        batch.teacher_prompts,
        micro_batch_size=train.micro_batch_size,
        longest=sampler.max_prompt_tokens + sampler.max_response_tokens,
        response_width=sampler.max_response_tokens,
    )
    rows = sharding.batch_sharding(parts.mesh)
    return step_programs(jitted, batches, rows, single=train.batch_size == train.micro_batch_size)


def step_programs(
    jitted: TrainStep, batches: Sequence[DistillBatch], rows: NamedSharding, single: bool
) -> Iterator[Callable[[], Any]]:
    """Functions that compile what a step runs, one program each, for jit to find it there.

    Args:
      batches: with a shape and dtype in place of each array (`rollout.abstract_batches`).
      rows: sharding of a batch.
      single: whether a step is one micro-batch.
    """
    student, teacher, base = jitted.like.student, jitted.like.teacher, jitted.like.base
    zeros = jitted.zeros.lower(student)  # type: ignore[attr-defined]
    accumulator = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        zeros.out_info,
        zeros.compile().output_shardings,
    )

    def compiled(function: Any, *arguments: Any) -> Callable[[], Any]:
        return lambda: function.lower(*arguments).compile()

    yield compiled(jitted.apply, jitted.like, accumulator)
    for batch in batches:
        placed = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows), batch
        )
        if single:
            yield compiled(jitted.single, student, teacher, placed, base)
        else:
            yield compiled(jitted.accumulate, student, teacher, accumulator, placed, base)


def worth_compiling_ahead() -> bool:
    """Whether compiling beside an evaluation hides it: on a CPU either would slow the other down.

    Several processes must compile in one order, which two threads of each would not keep.
    """
    return jax.default_backend() != "cpu" and jax.process_count() == 1


@contextlib.contextmanager
def compiling_ahead(programs: Iterable[Callable[[], Any]]) -> Iterator[threading.Thread]:
    """Inside, a thread compiles one program after the other; leaving ends it after the one at hand.

    Leaving waits for that one: an interpreter that ends while XLA compiles may crash.

    A program that does not compile is left out: the step that needs it raises the error.

    Yields:
      the thread.
    """
    stopped = threading.Event()

    def work() -> None:
        with contextlib.suppress(Exception):  # making the programs compiles too
            for program in programs:
                if stopped.is_set():
                    return
                with contextlib.suppress(Exception):
                    program()

    thread = threading.Thread(target=work, name="compiling ahead", daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        stopped.set()
        thread.join()
