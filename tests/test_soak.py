"""scripts/soak.py in two minutes: a run killed a few times, and what the comparison sees."""

import json
import math
import shutil
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import load_script

from opsdc_jax import cli
from opsdc_jax.config import InputError
from opsdc_jax.files import read_json_lines
from opsdc_jax.metrics import read_metrics

soak = load_script("soak")
SMALL = (
    "train.batch_size=4",
    "sampler.max_response_tokens=48",
    "teacher.every=8",
    "eval.samples_per_level=2",
    "eval.batch_size=6",
    "checkpoint.every_steps=2",
    "log.samples_every=4",
)
KILLS = 4


@pytest.fixture(scope="module")
def soaked(tmp_path_factory):
    out = tmp_path_factory.mktemp("soak") / "runs"
    sizes = ["--kills", str(KILLS), "--gap=3,9", "--seed=1", "--compare_every=10"]
    arguments = [f"--set={setting}" for setting in SMALL]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(soak, "LONGEST_END", math.inf)  # no timing in tests
        code = cli.run(soak.main, ["soak.py", *sizes, *arguments, "--out", str(out)])
    *kills, verdict = read_json_lines(out / "soak.jsonl")
    assert code == cli.EXIT_DONE, verdict
    return out, kills, verdict


def test_a_run_killed_at_random_equals_one_that_was_not(soaked):
    out, kills, verdict = soaked
    assert [row["kill"] for row in kills] == list(range(1, KILLS + 1))
    assert {row["signal"] for row in kills} == {"SIGKILL", "SIGTERM"}
    assert verdict["passed"]
    assert verdict["differ"] == []
    assert verdict["differing_bits"] == 0
    assert verdict["longest_end_s"] > 0
    continued = max(row["continued_from"] or 0 for row in kills)
    assert verdict["step"] == verdict["compared_rows"] > continued
    # The student once more as teacher, and as either moment of AdamW.
    arrays = soak.checkpoint(out / "killed" / "checkpoints" / str(verdict["step"]))
    student = sum(leaf.nbytes for name, leaf in arrays.items() if name.startswith("student"))
    assert verdict["compared_bytes"] >= 4 * student > 0


def test_a_run_went_on_from_where_it_was_killed(soaked):
    out, kills, _ = soaked
    printed = (out / "killed.log").read_text()
    assert "continuing after step" in printed
    assert any(row["step"] > 0 for row in kills)


@pytest.fixture
def altered(soaked, tmp_path):
    """A copy of the killed run, to be altered, and what is then found."""
    out, _, verdict = soaked
    folder = tmp_path / "altered"
    shutil.copytree(out / "killed", folder)
    return folder, lambda: soak.differences(out / "undisturbed", folder, verdict["step"])["differ"]


def test_a_row_that_differs_misses_or_comes_twice_is_found(altered):
    folder, differ = altered
    rows = read_metrics(folder / "metrics.jsonl")

    def write(changed):
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))

    write([row | {"tokens_per_s": 1.0} for row in rows])
    assert differ() == []
    write([row | {"loss": row["loss"] + 1e-9 * (row["step"] == 3)} for row in rows])
    assert differ() == ["metrics.jsonl, step 3, loss"]
    write([row for row in rows if row["step"] != 3])
    assert "misses or doubles steps: [1, 2, 4" in differ()[0]
    write([*rows[:3], *rows[2:]])
    with pytest.raises(InputError, match=r"metrics.jsonl:4 is of step 3, after step 3"):
        differ()


def test_a_file_that_differs_or_is_too_much_is_found(altered):
    folder, differ = altered
    (folder / "samples" / "step-000001.json").write_text("[]")
    (folder / "eval" / "tiny" / "base.jsonl").unlink()
    (folder / "samples" / "step-000003.json").write_text("[]")
    (folder / "samples" / "step-900000.json").write_text("[]")  # beyond what is compared
    (folder / "samples" / "step-000002.tmp").write_text("")
    names = ["eval/tiny/base.jsonl", "samples/step-000001.json", "samples/step-000003.json"]
    assert differ() == names


def test_a_single_bit_of_a_checkpoint_is_found(altered, soaked):
    folder, differ = altered
    item = folder / "checkpoints" / str(soaked[2]["step"]) / "teacher"
    tree = jax.tree.map(np.array, ocp.StandardCheckpointer().restore(item))
    leaf = jax.tree.leaves(tree)[0]
    leaf.view(np.uint8).reshape(-1)[5] ^= 0b100
    shutil.rmtree(item)
    with ocp.StandardCheckpointer() as writer:
        writer.save(item, tree)
    (found,) = differ()
    assert found.startswith(f"checkpoint {soaked[2]['step']}, teacher[")
    assert found.endswith(": 1 bits")


def test_bad_input_is_refused(tmp_path, capsys):
    assert cli.run(soak.main, ["soak.py", "--out", str(tmp_path)]) == cli.EXIT_BAD_INPUT
    assert "exists already" in capsys.readouterr().err
    arguments = ["soak.py", "--gap=5", "--out", str(tmp_path / "new")]
    assert cli.run(soak.main, arguments) == cli.EXIT_BAD_INPUT
    assert "--gap 15,45" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_last_step_is_read_from_the_end_of_the_file(tmp_path):
    run = soak.Run(tmp_path / "run", set(), ())
    assert run.step() == 0
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text('{"step": 1')
    assert run.step() == 0
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 2000)) + '{"step": 20')
    assert run.step() == 1999


def test_sigterm_itself_is_a_right_end_only_before_anything_is_printed():
    assert soak.right_ends(signal.SIGTERM, "") == (cli.EXIT_STOPPED, -signal.SIGTERM)
    assert soak.right_ends(signal.SIGTERM, "step 1") == (cli.EXIT_STOPPED,)
    assert soak.right_ends(signal.SIGKILL, "step 1") == (-signal.SIGKILL,)


def test_growth_is_judged_after_the_first_third():
    memory = soak.Memory(run=None)
    memory.readings = [(step, 100_000 if step <= 20 else 200_000) for step in range(1, 61)]
    assert memory.verdict()["rss_growth"] == 0.0
    assert memory.verdict()["rss_from_step"] == 21
    memory.readings = [(step, 100_000 + 1_000 * step) for step in range(1, 61)]
    growth = memory.verdict()["rss_growth"]
    assert growth == pytest.approx(158.5 / 122.5 - 1, abs=1e-3)
    assert not soak.grew_little(growth)
    memory.readings = memory.readings[:10]
    assert memory.verdict()["rss_growth"] is None
    assert soak.grew_little(None)
