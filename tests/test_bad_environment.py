"""Environments that lie, in processes of their own: exit codes, and what stands on the streams."""

import os
import resource
import subprocess
import sys

import pytest
from bad_inputs import Sandbox, assert_one_sentence, tree
from helpers import ROOT

from opsdc_jax import cli, distributed

ROW = '{"problem": "start 1"}\n'
# Name -> (environment, overrides, what standard error must say).
REFUSED = {
    "one of three variables": (
        {"JAX_NUM_PROCESSES": "2"},
        [],
        "error: JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID must be set too",
    ),
    "no such platform": (
        {"JAX_PLATFORMS": "nonsense"},
        [],
        "error: JAX finds no devices, check JAX_PLATFORMS: Unable to initialize backend 'nonsense'",
    ),
    "no place for programs": (
        {"JAX_COMPILATION_CACHE_DIR": "/proc/cache"},
        [],
        "error: JAX_COMPILATION_CACHE_DIR=/proc/cache cannot be written (",
    ),
    "no home": (
        {"HOME": "/proc/home", "JAX_COMPILATION_CACHE_DIR": ""},
        ["--workdir", "/proc/run"],
        "error: /proc/run cannot be written (",
    ),
    "a terminal without the letter": (
        {"PYTHONIOENCODING": "ascii"},
        ["--config.data.source={path}/é.jsonl", "--config.sampler.max_response_tokens=99999"],
        "error: sampler.max_prompt_tokens + sampler.max_response_tokens",
    ),
    "a full disk": ({}, [], "error: {path}/run/config.json cannot be written (File too large)"),
}


class Started:
    """A process that was started, its sandbox as it was before."""

    def __init__(self, path, environment, overrides, *, full_disk=False):
        path.mkdir()
        self.sandbox = Sandbox(path)
        self.sandbox.file("é.jsonl", ROW)
        self.before = tree(path)
        name, *rest = self.sandbox.train(*(text.replace("{path}", str(path)) for text in overrides))
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *rest],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
            preexec_fn=_no_room if full_disk else None,
        )

    def ended(self):
        """Exit code, standard output and standard error; that it wrote nothing is checked."""
        out, error = self.process.communicate(timeout=120)
        assert tree(self.sandbox.path) == self.before, "nothing may be written"
        return self.process.returncode, out.decode(), error.decode()


def _no_room():
    """No file takes more than 8 bytes, as on a full disk: config.json has more."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, 8))


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """All of them at once: most of their time is the import of the libraries."""
    path = tmp_path_factory.mktemp("environments")
    bad = ["--config.seed=-1"]
    processes = {
        name: Started(path / str(number), environment, overrides, full_disk=name == "a full disk")
        for number, (name, (environment, overrides, _)) in enumerate(REFUSED.items())
    } | {
        "debug": Started(path / "debug", {}, [*bad, "--debug"]),
        "JAX": Started(path / "jax", {"JAX_ENABLE_X64": "maybe"}, bad),
    }
    yield processes
    for found in processes.values():
        found.process.kill()
        found.process.wait()


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(started, name):
    code, _, error = started[name].ended()
    assert error.startswith(REFUSED[name][2].replace("{path}", str(started[name].sandbox.path)))
    assert_one_sentence(error)
    assert code == cli.EXIT_BAD_INPUT


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"JAX_COORDINATOR_ADDRESS": "here", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
            "JAX_COORDINATOR_ADDRESS='here' must be HOST:PORT",
        ),
        ({"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "many"}, "SLURM_NTASKS='many' must be a"),
    ],
)
def test_several_processes_that_cannot_be(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(cli.InputError, match=message):
        distributed.initialize()


def test_debug_shows_where_bad_input_was_found(started):
    code, _, error = started["debug"].ended()
    assert code == cli.EXIT_BAD_INPUT
    assert error.startswith("Traceback (most recent call last):")
    assert "in validate" in error
    assert error.splitlines()[-1] == "error: seed=-1 must not be negative"


def test_what_jax_itself_refuses_keeps_its_own_words(started):
    """It is read while JAX is imported, before there is anything of ours."""
    code, _, error = started["JAX"].ended()
    assert code == cli.EXIT_FAILED
    assert "JAX_ENABLE_X64" in error.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--debug"], True),
        (["--debug=true"], True),
        (["--nodebug"], False),
        (["--debug", "--nodebug"], False),
        (["--debug=perhaps"], False),
        ([], False),
    ],
)
def test_spellings_of_debug(arguments, shown, capsys):
    def main(argv):
        try:
            int("x")
        except ValueError:
            raise cli.InputError("give a number") from None

    assert cli.run(main, ["x.py", *arguments, "--budget=3"]) == cli.EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert error.endswith("error: give a number\n")
    assert ("invalid literal for int()" in error) == shown, "the error behind it is shown too"


def test_a_user_without_a_home_has_a_cache_all_the_same(monkeypatch, tmp_path):
    from opsdc_jax import files

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", no_home)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert files.user_cache() == tmp_path / "opsdc_jax"
