"""The benchmark of the train step: figures are those of the run, and torch does the same work."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SMALL, load_script

from opsdc_jax.config import InputError
from opsdc_jax.models import hf, qwen3
from opsdc_jax.models.layers import Qwen3Config
from opsdc_jax.models.weights import load_params

bench = load_script("bench_train")
WORK = bench.Work(SMALL, batch=4, micro_batch=4, prompt=3, response=5, chunk=8, warmup=1, steps=1)


def test_every_figure_is_there_and_adds_up():
    row = bench.measure("jax", WORK)
    json.dumps(row)
    assert row["tokens_per_second"] * row["seconds"] == pytest.approx(4 * 8, rel=0.05)
    assert row["share"] > 0
    assert row["products_share"] > 0
    assert row["peak_rss_gib"] > 0.05
    assert row["loss"] > 0


def test_operations_are_those_of_the_compiled_products():
    """XLA counts whole squares of attention, and all that is no product: by little, if wide."""
    model = Qwen3Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    work = WORK._replace(model=model, prompt=1, response=15)
    params = qwen3.abstract_params(model)
    tokens = jax.ShapeDtypeStruct((work.batch, 16), "int32")

    def forward(params, tokens):
        hidden = qwen3.forward(params, model, tokens)[:, 1:]
        return qwen3.logits(hidden, qwen3.unembedding(params), model.vocab_size)

    counted = jax.jit(forward).lower(params, tokens).compile().cost_analysis()["flops"]
    assert bench.flops(work) / 4 == pytest.approx(counted, rel=0.05)
    assert bench.flops(work) / 4 < counted


def test_the_products_alone_are_those_of_a_step(monkeypatch):
    """With whole squares of attention, and its scores formed twice."""

    def operations(equation, *shapes):
        letters = equation.partition("->")[0].replace(",", "")
        return 2 * math.prod(dict(zip(letters, itertools.chain(*shapes), strict=True)).values())

    monkeypatch.setattr(bench, "product_seconds", operations)
    work = WORK._replace(micro_batch=2, chunk=2)
    model, B, T = SMALL, work.batch, work.prompt + work.response
    square = 2 * B * model.num_attention_heads * T * T * model.head_dim
    triangle = square * (T + 1) / (2 * T)
    expected = bench.flops(work) + model.num_hidden_layers * (9 * square - 8 * triangle)
    assert bench.products_seconds(work) == expected


def test_torch_computes_the_same_loss_of_the_same_weights(tmp_path):
    torch = pytest.importorskip("torch")
    given = bench.inputs(WORK)
    student, teacher = bench.torch_models(SMALL)
    log_probs = []
    for model, prompts in ((student, given.student), (teacher, given.teacher)):
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(8.0 if weight.ndim > 1 else 1.0)  # far from uniform
        model.save_pretrained(tmp_path)
        architecture = hf.load_config(tmp_path)
        params = load_params(tmp_path, architecture)
        tokens = np.concatenate([prompts, given.responses], axis=1)
        hidden = qwen3.forward(params, architecture, tokens)[:, WORK.prompt - 1 : -1]
        head = qwen3.unembedding(params)
        log_probs.append(jax.nn.log_softmax(qwen3.logits(hidden, head, SMALL.vocab_size)))
    log_q, log_p = log_probs
    expected = float((jnp.exp(log_q) * (log_q - log_p)).sum())
    assert expected / given.responses.size > 0.1
    loss = bench.torch_loss(student, teacher, given).item()
    assert loss == pytest.approx(expected, rel=1e-5)
    step = bench.torch_step(WORK)
    assert step() > step() > 0, "it learns"


def test_micro_batches_must_divide_the_batch():
    with pytest.raises(InputError, match=r"--batch=4 is not a multiple of --micro_batch=3"):
        bench.main(["bench_train", "--batch=4", "--micro_batch=3"])


@pytest.mark.parametrize("flag", ["side", "against"])
def test_torch_is_asked_for_first(monkeypatch, flag):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    for way in ("measure", "compare"):
        monkeypatch.setattr(bench, way, lambda *_: pytest.fail("measured before"))
    with pytest.raises(InputError, match="torch is not installed"):
        bench.main(["bench_train", f"--{flag}=torch"])
