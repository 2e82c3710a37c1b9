"""Defaults, validation and the command line's overrides."""

import importlib.util
import sys

import pytest
from absl import flags
from helpers import ROOT
from ml_collections import ConfigDict

from opsdc_jax import cli, config
from opsdc_jax.config import InputError, default_config, differing_keys, flatten, validate

CONFIGS = sorted((ROOT / "configs").glob("*.py"))
POLICY_GRADIENT = {"loss.divergence": "nll", "loss.weights": "advantages"}
TINY = str(ROOT / "configs" / "tiny.py")


def parse(*arguments):
    argv = ["train.py", *arguments]
    values = cli.config_flag_values(argv)
    flags.DEFINE_string("workdir", None, "a folder", flag_values=values)
    return cli.parse(values, argv)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid_and_adds_no_key(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings = module.get_config()
    validate(settings)
    assert flatten(settings).keys() == flatten(default_config()).keys()
    for word in ("Command:", "Hardware:", "Time:", "Expected:"):
        assert word in module.__doc__


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("teacher.every", -1, "teacher.every=-1 must not be negative"),
        ("train.steps", 0, "train.steps=0 must be positive"),
        ("train.batch_size", -4, "train.batch_size=-4 must be positive"),
        ("sampler.max_response_tokens", 0, "must be positive"),
        ("sampler.temperature", -0.1, "must not be negative"),
        ("sampler.temperature", float("nan"), "must be a finite number"),
        ("sampler.top_p", 0.0, "sampler.top_p=0.0 must be above 0 and at most 1"),
        ("eval.top_p", 1.5, "must be above 0"),
        ("eval.samples", 0, "eval.samples=0 must be positive"),
        ("eval.temperature", 0.0, "eval.samples=8 at eval.temperature=0 would all be the same"),
        ("optim.lr", -1e-6, "optim.lr"),
        ("optim.b2", 1.0, "must be in"),
        ("loss.divergence", "kl", "is not one of.*reverse_kl"),
        ("model.compute_dtype", "float16", "is not one of.*bfloat16"),
        ("loss.weights", "rows", "is not one of.*sequences"),
        ("loss.anchor", -0.1, "loss.anchor=-0.1 must not be negative"),
        ("loss.length_penalty", 1.5, "must be at least 0 and at most 1"),
        ("sampler.policy", "base", "is not one of.*teacher"),
        ("loss.top_k", -1, "loss.top_k=-1 must not be negative"),
        ("teacher.decay", 1.0, r"teacher.decay=1.0 must be in \[0, 1\)"),
        ("teacher.decay", 0.95, "less than bfloat16 can hold: set model.teacher_dtype='float32'"),
        ("train.micro_batch_size", 5, "32 is not a multiple of train.micro_batch_size=5"),
        ("sampler.slots", -1, "sampler.slots=-1 must not be negative"),
        ("seed", -1, "seed=-1"),
        ("seed", 2**31, "must be at most"),
    ],
)
def test_bad_values_are_refused_by_name(key, value, message):
    settings = default_config()
    settings.update_from_flattened_dict({key: value})
    with pytest.raises(InputError, match=message):
        validate(settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"teacher.decay": 0.5, "teacher.every": 0, "model.teacher_dtype": "float32"},
            "teacher.every=0 is a teacher that never changes",
        ),
        ({"loss.top_k": 5, "loss.divergence": "jsd"}, "loss.top_k=5 is of the reverse KL alone"),
        ({"loss.weights": "advantages"}, "set loss.divergence='nll'"),
        (POLICY_GRADIENT | {"sampler.policy": "teacher"}, "and sampler.policy='student'"),
        (POLICY_GRADIENT | {"loss.only_correct": True}, "learns from wrong answers too"),
        (
            POLICY_GRADIENT | {"train.batch_size": 1, "train.micro_batch_size": 1},
            "raise train.batch_size",
        ),
        ({"loss.length_penalty": 0.5}, "loss.length_penalty=0.5 is of the policy gradient alone"),
        ({"loss.divergence": "nll"}, "teaches nothing: set sampler.policy='teacher'"),
    ],
)
def test_contradictions_are_refused(changes, message):
    settings = default_config()
    settings.update_from_flattened_dict(changes)
    with pytest.raises(InputError, match=message):
        validate(settings)


def test_overrides_arrive():
    args = parse("--config", TINY, "--config.train.steps=3", "--config.optim.lr=5e-7")
    assert (args.config.train.steps, args.config.optim.lr) == (3, 5e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", TINY, "--config.train.stpes=3"], "config.train.stpes.*config.train.steps"),
        (["--config", TINY, "--config.tarin.steps=3"], "did you mean config.train.steps"),
        (["--config", TINY, "--config.train=3"], "unknown key config.train:"),
        (["--config", TINY, "--config.train.steps=many"], "config.train.steps=many"),
        (["--config", TINY, "--config.train.steps=1.5"], "config.train.steps=1.5"),
        (["--config", TINY, "--workdri=x"], "workdri.*workdir"),
        (["--config", TINY, "stray"], "unexpected argument 'stray'"),
        (["--config", "nowhere.py"], "nowhere.py"),
        ([], "--config FILE is required"),
    ],
)
def test_bad_command_lines_are_one_sentence(arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        parse(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["config.train.stpes = 5"], "config.train.stpes: did you mean config.train.steps"),
        (["del config.optim"], "config.optim.b1 is missing|config.optim.*missing"),
        (["config.train.steps = 'many'"], "TypeError"),
        (["import nothing_of_this_name"], "ModuleNotFoundError"),
        (["1 / 0"], "ZeroDivisionError"),
    ],
)
def test_bad_config_files_are_one_sentence(tmp_path, lines, message):
    body = "\n    ".join(["config = default_config()", *lines, "return config"])
    path = tmp_path / "mine.py"
    path.write_text(
        f"from opsdc_jax.config import default_config\n\n\ndef get_config():\n    {body}\n"
    )
    with pytest.raises(InputError, match=message) as caught:
        validate(parse("--config", str(path)).config)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_a_config_file_without_get_config_is_refused(tmp_path, monkeypatch):
    # Loading runs a file inside the module of the file before it, which had a get_config.
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(InputError, match="get_config"):
        parse("--config", str(tmp_path / "empty.py"))


@pytest.mark.parametrize("arguments", [["--config", TINY], [f"--config={TINY}"]])
def test_the_run_is_named_after_its_config(arguments):
    assert cli.config_name(["train.py", *arguments]) == "tiny"


def test_bad_input_exits_with_2_and_one_line(capsys):
    def main(argv):
        raise InputError("change this")

    assert cli.run(main, []) == cli.EXIT_BAD_INPUT == 2
    assert capsys.readouterr().err == "error: change this\n"


def test_other_errors_keep_their_traceback():
    def main(argv):
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError):
        cli.run(main, [])


def test_flatten_and_differing_keys():
    ours = flatten(ConfigDict({"a": {"b": 1, "c": 2}, "d": 3}))
    assert ours == {"a.b": 1, "a.c": 2, "d": 3}
    assert differing_keys(ours, ours) == []
    theirs = {"a.b": 1, "a.c": 5, "e": 0}
    assert differing_keys(ours, theirs) == [
        "a.c: 5 -> 2",
        "d: '(absent)' -> 3",
        "e: 0 -> '(absent)'",
    ]


def test_get_reads_dotted_keys():
    assert config.get(default_config(), "teacher.every") == 50
