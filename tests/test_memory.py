"""What is never held: [T, T] at 9,216 tokens, [tokens, vocabulary], a program per layer.

And what is formed once, not for every reader: rotary tables.
"""

import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import pytest
from helpers import SMALL, shapes_within

from opsdc_jax import distill, divergences, losses, sampler, sampling, sharding
from opsdc_jax.models import qwen3
from opsdc_jax.rollout import DistillBatch

PROMPT, RESPONSE = 1024, 8192
OPTIM = types.SimpleNamespace(
    lr=1e-2, warmup_steps=0, b1=0.9, b2=0.95, weight_decay=0.01, clip_norm=1.0
)


def train_step(model, mesh=None, chunk_tokens=512, teacher_dtype="bfloat16"):
    mesh = mesh or sharding.make_mesh({"replica": 1, "fsdp": -1, "tensor": 1})
    return distill.make_train_step(
        model,
        distill.make_optimizer(OPTIM),
        divergence="reverse_kl",
        chunk_tokens=chunk_tokens,
        vocab_size=model.vocab_size,
        shardings=qwen3.shardings(model, mesh),
        teacher_dtype=teacher_dtype,
    )


def abstract_batch(rows, prompt, response):
    def array(*shape, dtype="int32"):
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    row, reply = array(prompt + response), array(response)
    return DistillBatch(
        row,
        row,
        array(),
        array(),
        reply,
        array(),
        array(response, dtype="float32"),
        array(dtype="float32"),
        array(dtype="float32"),
    )


def accumulate_arguments(jitted, batch):
    accumulator = jax.eval_shape(jitted.zeros, jitted.like.student)
    return jitted.like.student, jitted.like.teacher, accumulator, batch


def largest_of_step_and_prefill(attention: str) -> tuple[int, int]:
    """Elements of the largest intermediate array of either program at 9,216 tokens."""
    model = dataclasses.replace(SMALL, attention=attention, remat="full")
    jitted = train_step(model)
    step = jitted.accumulate.trace(
        *accumulate_arguments(jitted, abstract_batch(1, PROMPT, RESPONSE))
    )
    tokens = jax.ShapeDtypeStruct((1, PROMPT + RESPONSE), jnp.int32)
    valid = jax.ShapeDtypeStruct(tokens.shape, bool)
    prefill = jax.make_jaxpr(
        lambda params, tokens, valid: qwen3.prefill(
            params, model, tokens, positions_BxT=tokens, valid_BxT=valid
        )
    )(jitted.like.student, tokens, valid)
    return tuple(max(map(math.prod, shapes_within(program.jaxpr))) for program in (step, prefill))


def test_no_array_of_tokens_by_tokens_at_9216():
    """Forward, backward and prefill, masks included; the dense way would show."""
    tokens = PROMPT + RESPONSE
    for largest in largest_of_step_and_prefill("auto"):
        assert largest < tokens**2 / 64
    for largest in largest_of_step_and_prefill("dense"):
        assert largest >= tokens**2


def test_the_train_step_is_one_program_at_any_depth():
    """As many operations at 36 as at 64 layers, in both of its parts."""

    def operations(layers):
        jitted = train_step(dataclasses.replace(SMALL, num_hidden_layers=layers, remat="full"))
        arguments = accumulate_arguments(jitted, abstract_batch(2, 4, 8))
        programs = (
            jitted.accumulate.lower(*arguments),
            jitted.apply.lower(jitted.like, arguments[2]),
        )
        return [program.as_text().count(" = stablehlo.") for program in programs]

    shallow, deep = operations(36), operations(64)
    assert shallow == deep
    assert min(shallow) > 100


def temporary_bytes_of_the_loss(name, tokens, vocabulary, vocab_size, chunk):
    """Of a divergence's gradient by the student's hidden states, of width 16, and head."""

    def loss(student, student_head, teacher, teacher_head, *labels):
        rest = (student, student_head, teacher, teacher_head, *labels)
        chosen = divergences.DIVERGENCES[name]
        return losses.divergence_sums(chosen, vocab_size, chunk, None, *rest).divergence

    hidden, head = (
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, tokens, 16), (vocabulary, 16))
    )
    kinds = ("int32", "float32", "float32", "bool")
    labels = [jax.ShapeDtypeStruct((1, tokens), kind) for kind in kinds]
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    compiled = gradient.lower(hidden, head, hidden, head, *labels).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", list(divergences.DIVERGENCES))
def test_memory_of_the_loss_does_not_grow_with_tokens_by_vocabulary(name):
    """Four times the tokens need the temporaries of their hidden states more, no more."""
    V, D = 4096, 16
    short, long = (temporary_bytes_of_the_loss(name, T, V, V, 64) for T in (256, 1024))
    assert short >= 64 * V * 4, "a chunk's logits are there"
    assert long - short <= 4 * 768 * D * 4


@pytest.mark.parametrize("vocab_size", [2**17, 2**17 - 300])
def test_a_chunks_logits_lie_in_memory_once_a_side(vocab_size):
    """No second array of them below their maximum, nor without the ids beyond the tokenizer's."""
    chunk, V = 64, 2**17
    used = temporary_bytes_of_the_loss("reverse_kl", 2 * chunk, V, vocab_size, chunk)
    assert 2 <= used / (chunk * V * 4) < 2.5


def test_no_second_array_of_the_embeddings_size_lies_beside_its_gradient():
    """Neither a chunk's part of the head's gradient nor that of the look-up; the update has none.

    A scaled copy of the gradient, or of an old moment, would be one.
    """
    model = dataclasses.replace(SMALL, vocab_size=2**15)
    embedding_bytes = model.vocab_size * model.hidden_size * 4
    jitted = train_step(model, chunk_tokens=2, teacher_dtype="float32")
    student, teacher, accumulator, batch = accumulate_arguments(jitted, abstract_batch(1, 4, 8))
    single = jitted.single.lower(student, teacher, batch)
    apply = jitted.apply.lower(jitted.like, accumulator)
    temporary = [
        program.compile().memory_analysis().temp_size_in_bytes for program in (single, apply)
    ]
    assert temporary[0] < embedding_bytes
    assert temporary[1] < 0.01 * embedding_bytes


@pytest.mark.parametrize("layers", [1, 4])
def test_rotary_tables_are_formed_once(layers):
    """On a CPU, XLA fuses a sine into all that reads it: for every head of every layer, left alone.

    A forward pass has one; sampling has its prompts', the first token's before each of two loops,
    and the next token's in them.
    """
    model = dataclasses.replace(SMALL, num_hidden_layers=layers)
    params = qwen3.abstract_params(model)
    tokens = jnp.zeros((2, 24), jnp.int32)
    gradient = jax.jit(jax.grad(lambda params: qwen3.forward(params, model, tokens).sum()))
    assert gradient.lower(params).compile().as_text().count(" cosine(") == 1
    request = sampler.Request(
        tokens,
        jnp.full(2, 24),
        jax.random.split(jax.random.key(0)),
        sampling.SamplingParams(),
        stop_ids=jnp.array([0]),
        pad_id=0,
    )
    sizes = {"vocab_size": model.vocab_size, "response_width": 64}
    mesh = sampler.decode_mesh(
        model, sharding.make_mesh({"replica": 1, "fsdp": -1, "tensor": 1}), -1
    )
    program = sampler.generate.lower(params, model, request, mesh=mesh, **sizes).compile()
    assert program.as_text().count(" cosine(") <= 5
