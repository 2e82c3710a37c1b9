"""What is compiled ahead is what the steps then run; how long a start took."""

import time

import jax
import numpy as np
import pytest
from helpers import SMALL, load_config, random_params

from opsdc_jax import distill, rollout, sharding, startup
from opsdc_jax.metrics import CompileCounter
from opsdc_jax.models import qwen3
from opsdc_jax.rollout import Rollout

LONGEST, RESPONSE = 8, 4  # few widths: each is a program
STUDENT_PROMPTS = [[1, 2, 3], [4, 5, 6, 7], [8, 9], [1, 1, 1]]
TEACHER_PROMPTS = [[30, 31, 32, *prompt] for prompt in STUDENT_PROMPTS]


@pytest.mark.parametrize("micro_batch_size", [2, 4])
def test_steps_compile_nothing_after_their_programs_were_compiled_ahead(micro_batch_size):
    mesh = sharding.make_mesh(load_config("tiny").mesh)
    rows = sharding.batch_sharding(mesh)
    jitted = distill.make_train_step(
        SMALL,
        distill.make_optimizer(load_config("tiny").optim),
        divergence="reverse_kl",
        chunk_tokens=16,
        vocab_size=SMALL.vocab_size,
        shardings=qwen3.shardings(SMALL, mesh),
        teacher_dtype="float32",
    )
    prompts = STUDENT_PROMPTS, TEACHER_PROMPTS
    sizes = {"micro_batch_size": micro_batch_size, "longest": LONGEST}
    batches = rollout.abstract_batches(*prompts, **sizes, response_width=RESPONSE)
    single = micro_batch_size == len(STUDENT_PROMPTS)
    batches = batches[:1] if single else batches  # the only width that the lengths below need
    with startup.compiling_ahead(startup.step_programs(jitted, batches, rows, single)) as thread:
        thread.join()
    params = random_params(SMALL, seed=0)
    state = jitted.init(jax.device_put(params, qwen3.shardings(SMALL, mesh)))

    counter = CompileCounter()
    for lengths in ([1, 4, 2, 1], [4, 4, 1, 2]):
        sampled = Rollout(
            tokens_BxR=np.full((4, RESPONSE), 7, np.int32),
            lengths_B=np.array(lengths, np.int32),
            stopped_B=np.ones(4, bool),
            logprobs_BxR=np.full((4, RESPONSE), -1.0, np.float32),
        )
        placed = [
            sharding.place(batch, rows)
            for batch in rollout.micro_batches(sampled, *prompts, **sizes, pad_id=0)
        ]
        if single:
            accumulator = jitted.single(state.student, state.teacher, *placed, state.base)
        else:
            accumulator = jitted.zeros(state.student)
            for batch in placed:
                accumulator = jitted.accumulate(
                    state.student, state.teacher, accumulator, batch, state.base
                )
        state, metrics = jitted.apply(state, accumulator)
        assert float(metrics["loss"]) > 0
    assert counter.count == 0


def test_leaving_ends_the_thread_after_the_program_at_hand():
    compiled = []

    def program():
        compiled.append(len(compiled))
        time.sleep(0.01)
        raise ValueError("a program that does not compile")

    with startup.compiling_ahead(program for _ in range(10_000)) as thread:
        while len(compiled) < 2:
            time.sleep(0.01)
    assert not thread.is_alive()
    assert 2 <= len(compiled) < 10_000


def test_programs_that_cannot_be_made_are_left_to_the_steps(monkeypatch):
    raised = []
    monkeypatch.setattr("threading.excepthook", raised.append)

    def programs():
        yield lambda: None
        raise ValueError("no memory for the zeros")

    with startup.compiling_ahead(programs()) as thread:
        thread.join()
    assert raised == []


def test_a_start_counts_from_the_launch():
    took = startup.since_launch()
    assert took is None or took > 0
    assert startup.report(7, 1.25).startswith("step 7 begins")
    assert startup.report(7, 1.25).endswith("evaluations before it took 1.2 s")
