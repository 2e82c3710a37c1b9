"""scripts/sample.py: both modes side by side, on paper and on a terminal."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
import rich.console
from helpers import ROOT, load_script

from opsdc_jax import cli
from opsdc_jax.models import hf
from opsdc_jax.rollout import Rollout
from opsdc_jax.tiny import BASE_FOLDER

sample = load_script("sample")


def test_sample_shows_both_modes_side_by_side(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    arguments = ["--model", "tiny", "--prompt", "start 33 + 9 - 2", "--max_tokens", "40"]
    assert cli.run(sample.main, ["sample.py", *arguments]) == cli.EXIT_DONE
    lines = capsys.readouterr().out.splitlines()
    headings = next(line for line in lines if "prompt of" in line)
    assert headings.index("plain: prompt of 11 tokens") < headings.index(
        "concise (v1): prompt of 21"
    )
    assert any(line.count("<think>") == 2 for line in lines)
    assert next(line for line in reversed(lines) if line.strip()).count(" tokens") == 2


def test_sample_takes_more_devices_than_it_has_rows():
    """Eight, of which two hold each layer: two responses in rows for four."""
    arguments = ["--model", "tiny", "--prompt", "start 33 + 9 - 2", "--max_tokens", "8"]
    command = [sys.executable, str(ROOT / "scripts" / "sample.py"), *arguments]
    settings = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == cli.EXIT_DONE, done.stderr[-2000:]
    assert done.stdout.count("8 tokens, cut by the") == 2


def test_sample_streams_to_a_terminal():
    """Every look at a growing response is drawn, cut to the newest lines a screen can hold."""
    tokenizer = hf.load_tokenizer(BASE_FOLDER)
    ids = np.array(tokenizer("Wait . " * 100 + "Answer")["input_ids"])
    growing = [
        Rollout(np.stack([ids, ids]), np.array([length, 2]), np.array([False, True]), None)
        for length in (2, len(ids))
    ]
    screen = io.StringIO()
    console = rich.console.Console(file=screen, force_terminal=True, width=60, height=12)
    sample.show(console, ["left", "right"], tokenizer, growing)
    drawn = screen.getvalue().split("left")[1:]
    assert drawn[0].count("Wait") == 2
    assert 10 < drawn[1].count("Wait") < 60, "the newest lines"
    assert "Answer" in drawn[1]
    assert drawn[-1].count("Wait") == 101, "in the end the whole text"
    assert f"{len(ids)} tokens, cut by the" in drawn[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model is required"),
        (["--model", "tiny"], "--prompt is required"),
        (["--model", "tiny", "--prompt", "start <|im_end|>"], "contains a control token"),
        (["--model", "tiny", "--prompt", "start 1 + 2", "--max_tokens", "600"], "positions left"),
        (["--model", "tiny", "--prompt", "start 1 + 2", "--instruction", "v7"], "'v7' is neither"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, capsys):
    assert cli.run(sample.main, ["sample.py", *arguments]) == cli.EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
