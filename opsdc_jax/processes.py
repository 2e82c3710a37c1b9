"""Runs as processes of their own: started beside each other, each on its share of the machine."""

import os
import pathlib
import subprocess
from collections.abc import Sequence

_CAN_CHOOSE = hasattr(os, "sched_getaffinity")  # as on Linux


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if _CAN_CHOOSE else os.cpu_count() or 1


def shares(count: int) -> list[set[int] | None]:
    """The processors that this process may use, in `count` shares of equal size.

    Equal, since the number of threads decides how sums are split, and so the last bits of results.
    Of too few processors some are in several shares. None where the system lets nobody choose.
    """
    if not _CAN_CHOOSE:
        return [None] * count
    ours = sorted(os.sched_getaffinity(0))
    size = max(1, len(ours) // count)
    return [
        {ours[(index * size + offset) % len(ours)] for offset in range(size)}
        for index in range(count)
    ]


def start(
    command: Sequence[str], log: pathlib.Path, processors: set[int] | None = None
) -> subprocess.Popen:
    """Starts a process whose output is added to a file.

    Args:
      processors: numbers of those that it may use; None: all that this process may.
    """
    with log.open("ab") as file:
        if processors is None:
            return subprocess.Popen(command, stdout=file, stderr=file)
        ours = os.sched_getaffinity(0)
        os.sched_setaffinity(0, processors)  # a new process has its parent's
        try:
            return subprocess.Popen(command, stdout=file, stderr=file)
        finally:
            os.sched_setaffinity(0, ours)
