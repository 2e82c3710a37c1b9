"""The benchmark of sampling: every figure is there, and what cannot run is refused early."""

import importlib.util
import json

import jax
import pytest
from helpers import SMALL, load_script

from opsdc_jax.config import InputError
from opsdc_jax.models import qwen3
from opsdc_jax.sampling import SamplingParams

bench = load_script("bench_sampler")
MICRO = bench.Case(SMALL, batch=8, prompt=5, new=4)
DRAWING = SamplingParams(1.0, 1.0, 0, MICRO.new)


def test_every_figure_is_there_and_adds_up(monkeypatch):
    monkeypatch.setattr(bench, "read_bandwidth", lambda: 1e9)
    measured = bench.run_opsdc(MICRO, DRAWING, repeats=1)
    json.dumps(measured)
    new = MICRO.batch * MICRO.new
    assert measured["tokens_per_second"] == pytest.approx(new / measured["seconds"], rel=0.05)
    assert measured["bound_ms"] == pytest.approx(bench.step_bytes(MICRO) / 1e6, abs=1e-3)
    assert measured["peak_rss_gib"] > 0


def test_a_step_reads_every_weight_once_and_what_was_kept_so_far():
    weights = sum(leaf.size for leaf in jax.tree.leaves(qwen3.abstract_params(SMALL)))
    kept = MICRO.batch * (5 + 2) * 2 * 2 * 2 * 16  # context, keys and values, layers, heads, width
    assert bench.step_bytes(MICRO) == 4 * (weights + kept)


def test_the_spread_scenario_samples_the_same_both_ways():
    """Random weights of a vocabulary of 40: one id of them ends a response."""
    measured = bench.run_spread(MICRO._replace(new=6), repeats=1)
    json.dumps(measured)
    assert measured["prompts"] == 8 * MICRO.batch
    assert 3 < measured["mean_length"] < 6  # 1/40 a token, cut at 6


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_transformers_samples_as_many_tokens():
    measured = bench.run_torch(MICRO, DRAWING, repeats=1)
    assert measured["attention"] in ("eager", "sdpa")
    both = bench.compared({"share": 0.5} | measured, measured)
    assert both["ratio"] == both["rss_ratio"] == 1


@pytest.mark.skipif(importlib.util.find_spec("tunix") is None, reason="tunix is not installed")
def test_tunix_samples_for_every_prompt():
    with jax.legacy_prng_key("allow"):  # its own
        measured = bench.run_tunix(MICRO, DRAWING, repeats=1)
    both = bench.compared({"share": 0.5} | measured, measured)
    assert both["ratio"] == both["rss_ratio"] == 1


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--against=tunix"], "tunix is not installed.*pip install google-tunix==0.1.7"),
        (["--new=1"], "--new 2"),
        (["--batch=-1"], "at least 1"),
        (["--scenario=spread", "--against=torch"], "leave out --against"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(monkeypatch, arguments, match):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: name == "torch" or None)
    monkeypatch.setattr(bench, "RUNS", dict.fromkeys(bench.RUNS))
    with pytest.raises(InputError, match=match):
        bench.main(["bench_sampler.py", *arguments])
