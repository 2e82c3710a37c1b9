"""Several processes, one a host: how they find each other, and how they agree.

All processes run the same program on the same arguments. Prompts and evaluation problems are pure
functions of the configuration and the step, and sampled ids come back whole to every process, so
all of them take the same way through the loop. Only the first prints and writes; checkpoints are
written by all, each its own part, so the workdir must be a folder that all hosts share.
"""

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from opsdc_jax.config import InputError

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_STOPPING = (signal.SIGTERM, signal.SIGINT)
_SAME_REQUEST = 1.0  # seconds in which several signals are one request


def initialize() -> None:
    """Joins the processes of a run where the environment says there are several.

    To be called before anything touches a device. The environment says so by

    - JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID;
    - SLURM: a step of several tasks, started by srun;
    - a TPU slice of several hosts: TPU_WORKER_HOSTNAMES lists them, or, where nothing in the
      environment does, OPSDC_DISTRIBUTED=1 (set by launch/tpu_pod.sh).

    JAX itself finds the rest. Processes other than the first print nothing from here on.

    Raises:
      InputError: a variable says something that cannot be, or some of the three are missing.
    """
    if jax.distributed.is_initialized():
        return
    if any(name in os.environ for name in _EXPLICIT):
        jax.distributed.initialize(*_explicit())
    elif _named_by_slurm() or _named_by_tpu():
        jax.distributed.initialize()
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)


def _explicit() -> tuple[str, int, int]:
    missing = [name for name in _EXPLICIT if name not in os.environ]
    if missing:
        raise InputError(
            f"{', '.join(missing)} must be set too: {', '.join(_EXPLICIT)} go together"
        )
    address, *numbers = (os.environ[name] for name in _EXPLICIT)
    try:
        count, number = map(int, numbers)
    except ValueError:
        raise InputError(
            f"JAX_NUM_PROCESSES and JAX_PROCESS_ID must be whole numbers, not {numbers}"
        ) from None
    if not re.fullmatch(r".+:\d+", address):
        raise InputError(f"JAX_COORDINATOR_ADDRESS={address!r} must be HOST:PORT")
    if not 0 <= number < count:
        raise InputError(f"JAX_PROCESS_ID={number} is not in 0..{count - 1} (JAX_NUM_PROCESSES)")
    return address, count, number


def _named_by_slurm() -> bool:
    # SLURM_STEP_NODELIST: inside srun. A script of sbatch without it is one process.
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if "SLURM_STEP_NODELIST" in os.environ and not tasks.isdecimal():
        raise InputError(f"SLURM_NTASKS={tasks!r} must be a whole number")
    return "SLURM_STEP_NODELIST" in os.environ and int(tasks) > 1


def _named_by_tpu() -> bool:
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return "," in hosts or os.environ.get("OPSDC_DISTRIBUTED") == "1"


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def is_one_of_several() -> bool:
    """Whether `initialize` has joined processes."""
    return jax.distributed.is_initialized()


def leave(code: int) -> None:
    """Where several processes run, ends this one at once with an exit code.

    For one that failed: JAX's ordinary way out waits for all the others, and they may be waiting
    for this one in a collective. Once it is gone they end with an error.
    """
    if is_one_of_several():
        if is_first():
            time.sleep(1)  # the others may be about to say the same, and end with it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_for_all(name: str) -> None:
    """Returns when every process has come here.

    Args:
      name: of the place, for the message if one does not.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_process(flag: bool) -> bool:
    """Whether any process says so: the same answer everywhere (one small collective)."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def from_first(value: int) -> int:
    """The first process's value, on all of them (one small collective)."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.array(value)))


def array_from_first(values: np.ndarray) -> np.ndarray:
    """As `from_first`, of integers; the shape is the same everywhere."""
    if jax.process_count() == 1:
        return values
    return np.asarray(multihost_utils.broadcast_one_to_all(values))


def first_does(work: Callable[[], int | None]) -> int:
    """Runs `work` in the first process only; where it fails there, no process goes on.

    Returns:
      what it returned there, on all of them; 0 for None.

    Raises:
      Exception: the first process's own, there.
      InputError: that it failed, elsewhere.
    """
    failure: Exception | None = None
    result = 0
    if is_first():
        try:
            result = work() or 0
        except Exception as error:  # told to the others, then raised
            failure = error
    if from_first(failure is not None):
        raise failure or InputError("the first process failed: its message says why")
    return from_first(result)


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM or SIGINT to any process is a request to stop instead of its end.

    A later one ends the process that gets it, at once and with exit code 128 + its number, also
    while Python waits for a compilation or a device. Within a second it is the same request: a
    launcher may signal a process and its group.

    Yields:
      a function that all processes must call together: whether one of them was asked to stop.
    """
    asked: list[int] = []
    previous = {
        number: signal.signal(number, lambda got, _: asked.append(got)) for number in _STOPPING
    }
    # Python runs its handlers between two bytecodes, which may take minutes to come. The wakeup
    # file gets the number of a signal as it arrives, and a thread of its own can act on it.
    arriving, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    previous_wakeup = signal.set_wakeup_fd(wakeup)
    watcher = threading.Thread(target=_quit_at_the_second, args=(arriving,), daemon=True)
    watcher.start()
    try:
        yield lambda: any_process(bool(asked))
    finally:
        signal.set_wakeup_fd(previous_wakeup)
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.close(wakeup)  # ends the thread
        watcher.join()
        os.close(arriving)


def _quit_at_the_second(arriving: int) -> None:
    first = None
    while got := os.read(arriving, 1):
        if got[0] not in _STOPPING:
            continue
        if first is None:
            first = time.monotonic()
            name = signal.Signals(got[0]).name
            print(f"{name}: stopping soon; once more quits at once", file=sys.stderr, flush=True)
        elif time.monotonic() - first > _SAME_REQUEST:
            os._exit(128 + got[0])
