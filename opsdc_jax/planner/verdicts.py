"""Compiles programs, each in a process of its own, until their memory is known; remembers it."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from opsdc_jax.config import InputError
from opsdc_jax.files import read_json, source_digest, user_cache, write_json
from opsdc_jax.planner import hlo, programs
from opsdc_jax.planner.topology import Topology

# Of the package, relative: all that the programs are made of. A change makes verdicts old.
SOURCES = (
    "config.py",
    "continuous.py",
    "distill.py",
    "divergences.py",
    "losses.py",
    "models",
    "objective.py",
    "planner/hlo.py",
    "planner/memory.py",
    "planner/programs.py",
    "planner/roofline.py",
    "prefill.py",
    "rollout.py",
    "sampler.py",
    "sampling.py",
    "sharding.py",
    "slots.py",
    "threefry.py",
)
_TOTAL = re.compile(r"Memory Space: default[^\n]*\nTotal bytes: (\d+)")
_POLL_SECONDS = 0.1
_PROCESSES = 2  # that compile at a time
_LIMIT_SECONDS = 900  # of a compilation, before it counts as failed


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is known of one compiled program; bytes are per device.

    Attributes:
      peak: arguments, temporaries and outputs together; None where it does not compile.
      arguments: of these, the arguments; `state`: of these, parts of the train state.
      parts: further parts of memory it knows of, by name (`text`).
      cost: FLOPs and bytes of its matrix products, over all devices (`roofline.Cost`).
      collectives: bytes and number by kind (`hlo.collectives`).
      error: what the compiler said, where it refused for another reason than memory.
      seconds: that the verdict took.
    """

    peak: int | None
    arguments: int = 0
    state: int = 0
    parts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    cost: Mapping[str, float] = dataclasses.field(default_factory=dict)
    collectives: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0


class _Running(NamedTuple):
    process: subprocess.Popen
    folder: tempfile.TemporaryDirectory
    began: float


def verdicts(
    names: Sequence[str],
    spec: Mapping[str, Any],
    topology: Topology,
) -> dict[str, Verdict]:
    """Compiles programs, a few at a time; those seen before cost nothing.

    Args:
      names: of `programs.KEYS`.
      spec: see `programs.make_spec`.

    Raises:
      InputError: the topology is a TPU and libtpu is not installed.
    """
    if topology.platform == "tpu" and libtpu_version() is None:
        raise InputError(
            f"planning for {topology.name} needs libtpu: pip install 'opsdc-jax[plan]' (no TPU is "
            "needed)"
        )
    keys = {name: _cache_file(name, spec, topology) for name in names}
    kept = {name: _kept(path) for name, path in keys.items()}
    done = {name: verdict for name, verdict in kept.items() if verdict}
    waiting = [name for name in names if name not in done]
    running: dict[str, _Running] = {}
    try:
        while waiting or running:
            while waiting and len(running) < _PROCESSES:
                running[waiting[0]] = _start(waiting[0], spec, topology)
                del waiting[0]
            for name in list(running):
                verdict = _look(running[name])
                if verdict is not None:
                    _stop(running.pop(name))
                    done[name] = verdict
                    if verdict.peak is not None:  # a failure may be the machine's: not kept
                        _keep(keys[name], verdict)
            time.sleep(_POLL_SECONDS)
    finally:
        for left in running.values():
            _stop(left)
    return {name: done[name] for name in names}


def _kept(path: pathlib.Path) -> Verdict | None:
    """What `_keep` wrote; None where there is nothing, or nothing that can be read."""
    with contextlib.suppress(InputError, TypeError):  # TypeError: of other keys
        return Verdict(**read_json(path))
    return None


def _keep(path: pathlib.Path, verdict: Verdict) -> None:
    with contextlib.suppress(OSError, InputError):  # without a place to keep it, it is made again
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, dataclasses.asdict(verdict))


def _start(name: str, spec: Mapping[str, Any], topology: Topology) -> _Running:
    folder = tempfile.TemporaryDirectory(prefix="opsdc_jax_plan_")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        # libtpu must neither ask for a TPU's metadata nor hold a lock against its siblings.
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    if topology.platform != "tpu":
        count = f"--xla_force_host_platform_device_count={topology.devices}"
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()
    process = subprocess.Popen(
        [sys.executable, "-m", "opsdc_jax.planner.programs", folder.name],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    assert process.stdin is not None
    asked = {"program": name, "topology": topology.name, "spec": spec}
    process.stdin.write(json.dumps(asked).encode() + b"\n")
    process.stdin.flush()  # and left open: its end tells the process that we are gone
    return _Running(process, folder, time.perf_counter())


def _stop(running: _Running) -> None:
    running.process.kill()  # not terminate: libtpu would write a stack trace first
    running.process.wait()
    assert running.process.stdin is not None
    running.process.stdin.close()
    running.folder.cleanup()


def _look(running: _Running) -> Verdict | None:
    """The verdict, once there is one."""
    ended = running.process.poll() is not None
    folder = pathlib.Path(running.folder.name)
    seconds = round(time.perf_counter() - running.began, 1)
    hlo_file = folder.glob("*after_optimizations.txt")
    if ended or any(map(_is_whole, hlo_file)):
        peak = read_report(folder)
        if peak is not None:
            found = read_json(folder / "traced.json")
            text = _read(folder, "*after_optimizations.txt")
            return Verdict(peak, **found, collectives=hlo.collectives(text), seconds=seconds)
    if ended:
        message = _read(folder, "error.txt") or f"exit code {running.process.returncode}"
        return Verdict(None, error=message, seconds=seconds)
    if seconds > _LIMIT_SECONDS:
        return Verdict(None, error=f"no verdict within {_LIMIT_SECONDS} s", seconds=seconds)
    return None


def _is_whole(hlo_file: pathlib.Path) -> bool:
    """Whether the compiler, which writes its files beside each other, is done with this one."""
    with hlo_file.open("rb") as file:
        file.seek(max(hlo_file.stat().st_size - 8, 0))
        return file.read().rstrip().endswith(b"\n}")


def _read(folder: pathlib.Path, pattern: str) -> str:
    paths = sorted(folder.glob(pattern))
    return paths[-1].read_text(encoding="utf-8", errors="replace") if paths else ""


def read_report(folder: pathlib.Path) -> int | None:
    """Bytes of device memory in the compiler's memory report, arguments included."""
    found = _TOTAL.search(_read(folder, "*memory-usage-report.txt"))
    return int(found[1]) if found else None


def libtpu_version() -> str | None:
    """Of the libtpu that is installed; None without."""
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return None


def _cache_file(name: str, spec: Mapping[str, Any], topology: Topology) -> pathlib.Path:
    """Where a verdict is kept: named by everything that decides it."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    versions["libtpu"] = libtpu_version() or "" if topology.platform == "tpu" else ""
    settings = {key: spec["settings"][key] for key in programs.KEYS[name]}
    code = source_digest(*SOURCES)
    decides = [code, name, {**spec, "settings": settings}, topology.name, versions]
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode())
    return user_cache() / "plans" / f"{digest.hexdigest()[:32]}.json"
