"""scripts/rehearse.py with one layer: the real vocabulary, tokenizer and prompts, two steps."""

import importlib.util
import json

import pytest
from helpers import ROOT, load_script

from opsdc_jax import cli

SHARED = ROOT.parent / "shared"
TOKENIZER = SHARED / "qwen3-tokenizer"
PROBLEMS = SHARED / "data" / "dapo_format_512.parquet"

rehearse = load_script("rehearse")


@pytest.mark.skipif(
    not (TOKENIZER.is_dir() and PROBLEMS.exists()),
    reason=f"needs {TOKENIZER.name} and {PROBLEMS.name} beside the project",
)
def test_a_rehearsal_with_one_layer(tmp_path, capfd):
    arguments = [
        f"--tokenizer={TOKENIZER}",
        f"--data={PROBLEMS}",
        f"--scratch={tmp_path}",
        "--layers=1",
        "--batch_size=1",
        "--prompt_tokens=256",
        "--response_tokens=8",
    ]
    assert cli.run(rehearse.main, ["rehearse.py", *arguments]) == cli.EXIT_DONE
    figures = json.loads(capfd.readouterr().out)
    assert figures["layers"] == 1
    torch = importlib.util.find_spec("torch")
    assert figures["read_back_by"] == ("transformers" if torch else "opsdc_jax")
    assert not any(tmp_path.iterdir()), "it removes what it made"


def test_what_the_training_refuses_is_bad_input_and_leaves_nothing(tmp_path, capfd):
    arguments = ["--tokenizer=tiny", "--data=/nowhere.jsonl", f"--scratch={tmp_path}", "--layers=1"]
    assert cli.run(rehearse.main, ["rehearse.py", *arguments]) == cli.EXIT_BAD_INPUT
    error = capfd.readouterr().err
    assert "there is no such file" in error
    assert "train.py refused its input" in error
    assert not any(tmp_path.iterdir())
