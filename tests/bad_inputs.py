"""What the tests of bad input share: a folder to spoil things in, and what a refusal must be."""

import contextlib
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from helpers import ROOT, load_script

from opsdc_jax import cli
from opsdc_jax.tiny import BASE_FOLDER

TINY = str(ROOT / "configs" / "tiny.py")
_PATIENCE = 60  # seconds after which a refusal counts as hung; a busy machine takes about one
script = functools.cache(load_script)


class Sandbox:
    """Writes bad files into a folder; the methods return the arguments that name them."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.workdir = path / "run"

    def train(self, *overrides: str) -> list[str]:
        """scripts/train.py on the tiny configuration, as small as it gets."""
        small = ["--config.eval.samples_per_level=2", "--config.train.steps=1"]
        return ["train", "--config", TINY, "--workdir", str(self.workdir), *small, *overrides]

    def file(self, name: str, content: bytes | str) -> pathlib.Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def config(self, text: str) -> list[str]:
        """scripts/train.py on a configuration file of this text."""
        return [
            "train",
            "--config",
            str(self.file("mine.py", text)),
            "--workdir",
            str(self.workdir),
        ]

    def config_lines(self, *lines: str) -> list[str]:
        """The same, on a file that changes the tiny configuration by these lines."""
        body = "".join(f"    {line}\n" for line in (*lines, "return config"))
        tiny = pathlib.Path(TINY).read_text().replace("    return config\n", body)
        return self.config(tiny)

    def data(self, name: str, content: bytes | str | list[Any]) -> list[str]:
        """Training on a table; a list is written as one object a line."""
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        return self.train(f"--config.data.source={self.file(name, content)}")

    def folder(self, **files: Any) -> pathlib.Path:
        """A copy of the tiny model.

        Args:
          files: stem of a JSON file -> entries to change in it, None to remove one; or its whole
            text, or None to remove the file.
        """
        folder = self.path / "model"
        shutil.copytree(BASE_FOLDER, folder)
        for stem, changes in files.items():
            path = folder / f"{stem}.json"
            if changes is None:
                path.unlink()
            elif isinstance(changes, str):
                path.write_text(changes)
            else:
                path.write_text(json.dumps(_changed(json.loads(path.read_text()), changes)))
        return folder

    def model(self, **files: Any) -> list[str]:
        """Training from a copy of the tiny model, see `folder`."""
        return self.on(self.folder(**files))

    def on(self, folder: pathlib.Path) -> list[str]:
        """Training from a model's folder."""
        return self.train(f"--config.model.path={folder}")


def _changed(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in {**values, **changes}.items() if v is not None}


Arguments = Callable[[Sandbox], list[str]]
Case = tuple[str, Arguments, str]
"""What is bad; the command line, made in a sandbox; what the message must say (a pattern)."""


def table(cases: list[Case]) -> pytest.MarkDecorator:
    """One test a case."""
    return pytest.mark.parametrize(
        ("arguments", "says"),
        [case[1:] for case in cases],
        ids=[re.sub(r"\W+", "-", case[0]) for case in cases],
    )


def assert_refused(
    sandbox: Sandbox,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: Arguments,
    says: str,
) -> None:
    """One sentence that says what is to be changed, exit code 2, and not a byte written."""
    name, *rest = arguments(sandbox)
    module = script(name)
    if name == "train":
        monkeypatch.setattr(module, "train", _accepted)
    # Configuration files are run in the module of the one before, which had a get_config.
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    before = tree(sandbox.path)
    capfd.readouterr()
    with no_hanging():
        code = cli.run(module.main, [f"{name}.py", *rest])
    error = capfd.readouterr().err
    assert re.search(says, error), error
    assert_one_sentence(error)
    assert code == cli.EXIT_BAD_INPUT
    assert tree(sandbox.path) == before, "nothing may be written"


def _accepted(*_: object) -> None:
    raise AssertionError("the run would begin")


def assert_one_sentence(error: str) -> None:
    assert error.startswith("error: "), error
    assert error.count("\n") == 1, error
    assert len(error) < 1000, error
    assert "Traceback" not in error


def tree(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
    """Everything below a folder: name -> size and time of change."""
    return {
        str(path): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if not path.is_dir()
    } | {str(path): (0, 0) for path in folder.rglob("*") if path.is_dir()}


@contextlib.contextmanager
def no_hanging() -> Iterator[None]:
    """A reader that waits for ever, on a pipe for instance, fails instead."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"no answer within {_PATIENCE} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def fifo(path: pathlib.Path) -> pathlib.Path:
    """A named pipe that nobody writes to."""
    os.mkfifo(path)
    return path
