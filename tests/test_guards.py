"""Guards: what they see in a run's rows, and what the run does then."""

import json
import math
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, load_script
from safetensors.numpy import load_file, save_file

from opsdc_jax import cli, guards
from opsdc_jax.config import default_config
from opsdc_jax.files import read_json, write_json, write_json_lines
from opsdc_jax.grading import SCORERS
from opsdc_jax.metrics import read_metrics
from opsdc_jax.tiny import BASE_FOLDER

# Of two runs of configs/tiny.py with seed 0: as it is, and with teacher.every=1, whose accuracy
# falls below half of the base's after step 19.
HEALTHY = {
    "student_entropy": (
        *(0.132, 0.126, 0.133, 0.123, 0.129, 0.115, 0.108, 0.112, 0.113, 0.131, 0.135, 0.126),
        *(0.140, 0.131, 0.146, 0.127, 0.141, 0.123, 0.127, 0.132, 0.139, 0.136, 0.128, 0.109),
        *(0.091, 0.085, 0.069, 0.056, 0.064, 0.063, 0.059, 0.079, 0.071, 0.065, 0.082, 0.073),
        *(0.083, 0.087, 0.096, 0.094),
    ),
    "response_tokens": (
        *(90.5, 85.0, 71.6, 70.4, 54.2, 50.9, 40.9, 40.5, 50.1, 45.5, 47.4, 60.4, 46.4, 58.8),
        *(52.5, 51.8, 55.0, 60.0, 55.2, 55.2, 53.1, 51.2, 43.8, 41.3, 35.6, 29.3, 29.5, 29.5),
        *(28.7, 30.8, 30.6, 32.5, 31.6, 29.6, 30.4, 25.8, 28.5, 34.6, 34.9, 32.8),
    ),
}
COLLAPSING = {
    "student_entropy": (
        *(0.132, 0.126, 0.132, 0.120, 0.125, 0.106, 0.084, 0.065, 0.049, 0.036, 0.032, 0.034),
        *(0.034, 0.045, 0.056, 0.063, 0.086, 0.179, 0.190, 0.278, 0.319, 0.317, 0.419, 0.321),
    ),
}
STEADY = {
    "response_tokens": 90.0,
    "truncated": 0.1,
    "repetition": 0.0,
    "student_entropy": 0.3,
    "logprob_gap_mean": 0.01,
}


def rows_of(**series):
    """Rows of a steady run in which some values take the given course."""
    steps = max(map(len, series.values()))
    return [
        {"step": number + 1, "skipped": 0.0}
        | STEADY
        | {key: values[number] for key, values in series.items()}
        for number in range(steps)
    ]


def settings(**changes):
    options = default_config().guards
    options.update(changes)
    return options


def first_alarm(rows):
    """The step at which the first guard fires, and which do; None if none does."""
    for count in range(1, len(rows) + 1):
        found = guards.alarms(rows[:count], settings())
        if found:
            return rows[count - 1]["step"], set(found)
    return None


@pytest.mark.parametrize(
    "series",
    [
        {**HEALTHY},
        {"response_tokens": (5000, 4600, 5300, 4700, 5200, *range(5000, 1500, -35))},
        {"truncated": (0.31, 0.19, 0.28, 0.44, 0.25, 0.41, 0.38, 0.28, 0.31)},
        {"truncated": (1.0,) * 6},
        {"student_entropy": (0.33, 0.34, 0.31, 0.30, 0.29, 0.30, 0.29)},
        {"student_entropy": (0.002, 0.01, 0.02, 0.03, 0.04, 0.04)},
        {"response_tokens": (90, 90, 90, 90, 400, 90, 90, 90)},
        {"logprob_gap_mean": (1e-7, 1e-7, 1e-6, 2e-2, 2e-2, 2e-2)},
        {"student_entropy": (0.3, 9.0)},
    ],
    ids=[
        *("demo", "compression", "noisy truncation", "short rollouts", "paper", "near zero"),
        *("one odd batch", "rounding", "too few steps"),
    ],
)
def test_healthy_runs_pass(series):
    assert first_alarm(rows_of(**series)) is None


@pytest.mark.parametrize(
    ("series", "step", "name"),
    [
        (COLLAPSING, 18, "student_entropy"),
        ({"student_entropy": (0.3, 0.3, 0.02, 0.02, 0.01)}, 4, "student_entropy"),
        ({"student_entropy": (0.132, 0.083, 0.270, 1.03, 2.0)}, 4, "student_entropy"),
        ({"response_tokens": (90, 80, 70, 60, 150, 160, 160)}, 7, "response_tokens"),
        ({"response_tokens": (*range(100, 240, 5),)}, 25, "response_tokens"),
        ({"response_tokens": (90, 70, 40, 8, 4, 3, 2)}, 6, "response_tokens"),
        ({"truncated": (0.1, 0.1, 0.1, 0.3, 0.6, 0.6)}, 6, "truncated"),
        ({"repetition": (0.0, 0.0, 0.0, 0.2, 0.5, 0.5)}, 6, "repetition"),
        ({"logprob_gap_mean": (0.01, 0.01, 0.2, 0.2, 0.2)}, 4, "logprob_gap_mean"),
    ],
)
def test_collapsing_runs_are_seen(series, step, name):
    assert first_alarm(rows_of(**series)) == (step, {name})


def with_skipped(rows, *steps):
    """The same rows, but that in some steps nothing was finite."""
    lost = {"skipped": 1.0, "student_entropy": math.nan, "logprob_gap_mean": math.nan}
    return [row | lost if row["step"] in steps else row for row in rows]


@pytest.mark.parametrize(
    ("skipped", "expected"),
    [((2, 3), None), ((2, 3, 5, 6), None), ((2, 3, 4), (4, {"nonfinite"})), ((1, 4, 7), None)],
)
def test_skipped_steps_stop_the_run_only_in_a_row(skipped, expected):
    rows = rows_of(student_entropy=(0.3,) * 8)
    assert first_alarm(with_skipped(rows, *skipped)) == expected


def test_a_skipped_step_hides_no_trouble():
    rows = with_skipped(rows_of(student_entropy=(0.3, 0.3, 0.3, 1.0, 1.0, 1.0, 1.0)), 4)
    assert first_alarm(rows) == (6, {"student_entropy"})


def test_rows_of_an_older_version_are_watched_as_far_as_they_go():
    rows = [{"step": row["step"], "truncated": 0.1} for row in rows_of(truncated=(0.1,) * 6)]
    assert first_alarm(rows) is None


@pytest.fixture
def guard(tmp_path):
    """A function that makes a Guard, with a list of the steps it saves."""
    saved = []

    def make(rows=(), **changes):
        made = guards.Guard(
            settings(**changes), rows, tmp_path, lambda state, step: saved.append((state, step))
        )
        return made, saved

    return make


def feed(guard, rows):
    """The step at which it stops and what it says; None if it does not."""
    for row in rows:
        try:
            guard.add(row, f"state {row['step']}")
        except guards.GuardError as error:
            return row["step"], str(error)
    return None


def test_a_run_that_continues_decides_as_if_it_had_never_stopped(guard):
    rows = rows_of(**COLLAPSING)
    step, message = feed(guard()[0], rows)
    assert step == 18
    for last_step in range(1, 18):
        resumed, _ = guard(rows[:last_step])
        resumed.check()
        assert feed(resumed, rows[last_step:]) == (step, message)


def test_the_message_names_the_last_checkpoint_before_the_trouble(guard, tmp_path):
    for step in (5, 10, 13, 15, 17):
        (tmp_path / str(step)).mkdir()
    (tmp_path / "14.orbax-checkpoint-tmp").mkdir()
    made, saved = guard()
    _, message = feed(made, rows_of(**COLLAPSING))
    assert "step 18: the student's entropy rises: student_entropy is 0.086" in message
    assert f"the last checkpoint from before is {tmp_path / '13'};" in message
    assert saved == []


def test_without_such_a_checkpoint_the_message_says_so(guard, tmp_path):
    (tmp_path / "17").mkdir()
    assert "no checkpoint from before is kept" in feed(guard()[0], rows_of(**COLLAPSING))[1]


def test_after_skipped_steps_the_unchanged_state_is_saved(guard, tmp_path):
    made, saved = guard()
    rows = with_skipped(rows_of(student_entropy=(0.3,) * 9), 5, 6, 7)
    step, message = feed(made, rows)
    assert step == 7
    assert "not finite in steps 5-7" in message
    assert str(tmp_path / "7") in message
    assert saved == [("state 7", 7)]
    with pytest.raises(guards.GuardError, match="steps 5-7"):
        guard(rows[:7])[0].check()


def test_with_action_warn_the_run_goes_on_and_each_trouble_is_told_once(guard, capsys):
    made, saved = guard(action="warn")
    assert feed(made, rows_of(**COLLAPSING)) is None
    assert capsys.readouterr().out.count("warning: step 18: the student's entropy rises") == 1
    assert saved == []
    made, saved = guard(action="warn")
    assert feed(made, with_skipped(rows_of(student_entropy=(0.3,) * 9), *range(1, 9))) is None
    assert capsys.readouterr().out.count("warning: ") == 1
    assert saved == []


def test_settings_that_are_known_to_fail_are_told():
    config = default_config()
    assert guards.risky_settings(config) == []
    config.teacher.every = 0
    assert guards.risky_settings(config) == []
    config.teacher.every, config.teacher.decay = 1, 0.95
    assert guards.risky_settings(config) == []
    config.teacher.every, config.teacher.decay, config.loss.divergence = 9, 0.0, "forward_kl"
    told = guards.risky_settings(config)
    assert [sentence.partition(":")[0] for sentence in told] == [
        "teacher.every=9",
        "loss.divergence='forward_kl'",
    ]


@pytest.mark.parametrize(("cut", "expected"), [(1, 0), (2, 1)])
def test_a_budget_under_the_bases_longest_tenth_is_told(tmp_path, cut, expected):
    (tmp_path / "aime24").mkdir()
    write_json(tmp_path / "aime24" / "base.settings.json", {})
    grade = {
        **{"level": "all", "scores": dict.fromkeys(SCORERS, True)},
        **dict.fromkeys(("index", "sample", "tokens", "thinking_tokens", "answer_tokens"), 1),
        **dict.fromkeys(("repetitive", "unparsed", "timed_out"), False),
        "doubt_words": 0,
    }
    write_json_lines(
        tmp_path / "aime24" / "base.grades.jsonl",
        [{**grade, "truncated": row < cut} for row in range(10)],
    )
    told = guards.short_budgets(tmp_path, 1000)
    assert len(told) == expected
    assert all("eval.max_response_tokens=1000 cuts 20%" in sentence for sentence in told)


# --- scripts/train.py ---------------------------------------------------------------------------

train = load_script("train")
TINY = ["train.py", "--config", str(ROOT / "configs" / "tiny.py")]
SMALL = [
    "--config.eval.source=none",
    "--config.train.steps=5",
    "--config.train.batch_size=4",
    "--config.train.micro_batch_size=2",
    "--config.sampler.max_response_tokens=24",
    "--config.log.token_views=0",
    "--config.log.tensorboard=True",
]


def run(workdir, *more):
    return cli.run(train.main, [*TINY, *SMALL, "--workdir", str(workdir), *more])


def test_a_model_that_gives_nan_stops_and_stays_stopped_unless_told(tmp_path, capsys):
    base, workdir = tmp_path / "base", tmp_path / "run"
    shutil.copytree(BASE_FOLDER, base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], jnp.nan)
    save_file(tensors, base / "model.safetensors")
    model = f"--config.model.path={base}"

    assert run(workdir, model) == cli.EXIT_GUARD
    error = capsys.readouterr().err
    assert error.startswith("stopped by a guard: step 3: loss or gradient was not finite in steps")
    assert error.count("\n") == 1
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["3"]
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3
    for line in lines:
        row = json.loads(line, parse_constant=pytest.fail)
        assert row["loss"] is None
        assert row["skipped"] == 1.0

    assert run(workdir, model) == cli.EXIT_GUARD
    assert capsys.readouterr().err == error

    assert run(workdir, model, "--config.guards.action=warn") == cli.EXIT_DONE
    assert "warning: step 3" in capsys.readouterr().out
    assert all(math.isnan(row["loss"]) for row in read_metrics(workdir / "metrics.jsonl"))
    assert (workdir / "report.html").exists()


def test_a_base_that_ends_elsewhere_than_its_chat_template_is_refused(tmp_path, capsys):
    base, workdir = tmp_path / "base", tmp_path / "run"
    shutil.copytree(BASE_FOLDER, base)
    for name, changes in (
        ("tokenizer_config.json", {"eos_token": "<|endoftext|>"}),
        ("generation_config.json", {"eos_token_id": 0}),
    ):
        write_json(base / name, read_json(base / name) | changes)
    assert run(workdir, f"--config.model.path={base}") == cli.EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert "ends an answer with 2 (<|im_end|>), which is not among the ids" in error
    assert "[0]" in error
    assert not workdir.exists()
