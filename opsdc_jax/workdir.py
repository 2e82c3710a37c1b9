"""A run's folder: config.json, metrics.jsonl, samples/, eval/, plots/, checkpoints/."""

import contextlib
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from opsdc_jax.config import InputError, check_kind, default_config, differing_keys, flatten
from opsdc_jax.files import check_regular, read_json, write_json, writing
from opsdc_jax.metrics import read_metrics
from opsdc_jax.results import SUMMARY

# Keys in which a run that continues may differ: where and in which portions it computes, and what
# it logs, and what the guards make of it. Results stay the same, but for roundings.
_FREE = re.compile(
    r"(mesh|log|checkpoint|guards)\.|(train\.micro_batch_size|eval\.batch_size|eval\.reuse"
    r"|sampler\.slots|optim\.offload|loss\.chunk_tokens|model\.remat|model\.attention)$"
)


class Workdir:
    """Paths of a run, made on opening; holds one run of one configuration.

    Opening one only reads; `create` writes. So bad input found in between leaves nothing behind.

    Args:
      path: the folder, which need not exist.
      config: the configuration of the run it holds or will hold.

    Raises:
      InputError: the folder holds something else, a run of another configuration (the keys that
        differ are named), or links to folders elsewhere.
    """

    def __init__(self, path: str | pathlib.Path, config: ConfigDict):
        self.path = pathlib.Path(path)
        self._config: dict[str, Any] = json.loads(config.to_json())
        check_regular(self._stored)
        if os.path.exists(self._stored):  # which no name upsets, however long
            self._refuse_other_run()
        elif os.path.isdir(self.path) and any(self.path.iterdir()):
            raise InputError(f"{self.path} is not empty and holds no run: choose another --workdir")
        self._refuse_links()

    def create(self) -> None:
        """Makes the folders and writes config.json.

        Raises:
          InputError: the folder cannot be written.
        """
        with writing(self.path):
            with _made_or_not(self.path):
                write_json(self._stored, self._config)  # first: it makes the folder ours
            for folder in (self.eval, self.samples, self.plots):
                folder.mkdir(exist_ok=True)

    @property
    def _stored(self) -> pathlib.Path:
        return self.path / "config.json"

    @property
    def eval(self) -> pathlib.Path:
        return self.path / "eval"

    @property
    def samples(self) -> pathlib.Path:
        return self.path / "samples"

    @property
    def plots(self) -> pathlib.Path:
        return self.path / "plots"

    @property
    def checkpoints(self) -> pathlib.Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> pathlib.Path:
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> pathlib.Path:
        """The final table; its presence marks a finished run."""
        return self.eval / SUMMARY

    def _refuse_links(self) -> None:
        """A run deletes what it writes anew, and nothing outside of its own folder."""
        ours = (self.eval, self.samples, self.plots, self.checkpoints, self.path / "tensorboard")
        inside = [path for folder in ours if os.path.isdir(folder) for path in folder.iterdir()]
        for path in (*ours, *inside):
            if os.path.islink(path) and os.path.isdir(path):
                raise InputError(
                    f"{path} is a link to another folder, where nothing must be deleted: put the "
                    "whole --workdir there instead"
                )

    def _refuse_other_run(self) -> None:
        theirs = flatten(ConfigDict(read_json(self._stored)))
        ours = flatten(ConfigDict(self._config))
        bound = {"train.micro_batch_size"} if ours["loss.weights"] == "micro_batches" else set()
        changed = differing_keys(
            *(
                {k: v for k, v in c.items() if k in bound or not _FREE.match(k)}
                for c in (ours, theirs)
            )
        )
        if changed:
            raise InputError(
                f"{self.path} holds a run of another configuration ({'; '.join(changed)}): "
                f"choose another --workdir, or the run's own settings to continue it"
            )
        read_metrics(self.metrics)  # which the run goes on with


@contextlib.contextmanager
def _made_or_not(path: pathlib.Path) -> Iterator[None]:
    """Makes a folder; where what is written into it first fails, it goes again."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    except Exception:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def read_config(path: pathlib.Path) -> ConfigDict:
    """The configuration of the run in a folder.

    Raises:
      InputError: the folder holds none, or something else.
    """
    stored = read_json(path / "config.json")
    missing = [name for name in default_config() if not isinstance(stored.get(name), dict | int)]
    if missing:
        raise InputError(f"{path / 'config.json'} is no run's configuration: it lacks {missing[0]}")
    settings, known = ConfigDict(stored), flatten(default_config())
    for key, value in flatten(settings).items():
        if key in known:
            check_kind(key, value, type(known[key]))
    return settings


def is_finished(path: str | pathlib.Path) -> bool:
    """Whether the folder holds a finished run."""
    return os.path.exists(pathlib.Path(path) / "eval" / SUMMARY)


def beside_finished(path: str | pathlib.Path) -> tuple[pathlib.Path, pathlib.Path | None]:
    """`path`, or the first of path-2, path-3, ... that holds no finished run, and the one before.

    Returns:
      that folder, and the last of the finished ones, None if there is none.
    """
    path, number = pathlib.Path(path), 1
    candidate, finished = path, None
    while is_finished(candidate):
        number += 1
        candidate, finished = path.with_name(f"{path.name}-{number}"), candidate
    return candidate, finished
