"""A grading process: python -m opsdc_jax.grading.worker SECONDS MEMORY, started by pool.py.

Writes "ready", then for each line {"gold": ..., "answers": [...]} on standard input one line, true
or false, for each answer. Ends with its input.
"""

import json
import os
import resource
import sys

from opsdc_jax.grading import symbolic
from opsdc_jax.grading.equivalence import equivalent


def main() -> None:
    """Serves until the input ends."""
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    symbolic.load()
    # From here on libraries may print what they like: it reaches neither caller nor terminal.
    results = os.fdopen(os.dup(1), "w", buffering=1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    results.write("ready\n")
    for line in sys.stdin:
        job = json.loads(line)
        _limit_cpu(2 * seconds + 10)
        for answer in job["answers"]:
            results.write(json.dumps(equivalent(answer, job["gold"])) + "\n")


def _limit_cpu(seconds: float) -> None:
    """Lets the system end this process if its parent is no longer there to do it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
