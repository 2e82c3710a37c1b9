"""Many gradings, in worker processes that are killed at a time limit.

Workers are plain `python -m opsdc_jax.grading.worker` processes which speak JSON lines: nothing is
forked beside the threads of JAX, and neither JAX nor the caller's main module is imported again.
"""

import contextlib
import json
import math
import os
import pathlib
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from opsdc_jax import processes
from opsdc_jax.grading.equivalence import Undecided, equivalent
from opsdc_jax.grading.extract import extract
from opsdc_jax.grading.scores import distinct, scores

SECONDS = 5.0  # limit of one item's grading; nearly all take under 0.1
MEMORY = 2**31  # bytes of address space of a worker: 10^{10^{10}} must not take the machine's
_START_SECONDS = 120.0  # limit of a worker's start, which imports sympy
_JOBS_PER_WORKER = 8  # a start costs about as much as so many gradings


class Grade(NamedTuple):
    """The scores of one response.

    Attributes:
      scores: see `opsdc_jax.grading`.
      timed_out: a worker was killed at the time limit, or died, over one of the answers, which
        then counts as wrong.
    """

    scores: dict[str, bool]
    timed_out: bool


class _Job(NamedTuple):
    """Answers that math-verify must compare with one gold."""

    gold: str
    answers: tuple[str, ...]


def grade_many(
    items: Iterable[tuple[str, str, bool]],
    *,
    workers: int | None = None,
    seconds: float = SECONDS,
) -> list[Grade]:
    """Grades every (response, gold, truncated), in order; the same results as `grade`.

    What takes no math-verify (numbers, letters, words) is graded here; if that is all, no process
    is started. Equal answers to equal golds are compared once.

    Args:
      workers: processes; one for each core that this process may use, if None.
      seconds: limit of one item.

    Raises:
      RuntimeError: a worker cannot be started.
    """
    extracted = [(extract(response), gold, truncated) for response, gold, truncated in items]
    known: dict[tuple[str, str], bool | None] = {}
    jobs = []
    for answers, gold, _ in extracted:
        undecided = []
        for answer in distinct(answers):
            if (answer, gold) not in known:
                known[answer, gold] = _quickly(answer, gold)
            if known[answer, gold] is None:
                undecided.append(answer)
        if undecided:
            jobs.append(_Job(gold, tuple(undecided)))
    jobs = list(dict.fromkeys(jobs))
    lost = _run(jobs, known, workers or processes.cores(), seconds) if jobs else set()
    grades = []
    for answers, gold, truncated in extracted:
        right = {answer for answer in distinct(answers) if known[answer, gold]}
        given_up = any((answer, gold) in lost for answer in distinct(answers))
        grades.append(Grade(scores(answers, right, truncated), given_up))
    return grades


def _quickly(answer: str, gold: str) -> bool | None:
    try:
        return equivalent(answer, gold, quick=True)
    except Undecided:
        return None


def _run(
    jobs: list[_Job],
    known: dict[tuple[str, str], bool | None],
    workers: int,
    seconds: float,
) -> set[tuple[str, str]]:
    """Enters the verdicts of all jobs into `known`; returns the pairs that were given up."""
    waiting = deque(jobs)
    lost: set[tuple[str, str]] = set()
    running: list[_Worker] = []
    count = min(workers, -(-len(jobs) // _JOBS_PER_WORKER))
    try:
        while waiting or any(worker.busy for worker in running):
            while len(running) < count and len(waiting) > sum(not w.busy for w in running):
                running.append(_Worker(seconds))
            _wait(running)
            for worker in list(running):
                known |= worker.verdicts()
                if worker.failed():
                    lost |= worker.kill()
                    running.remove(worker)
                elif waiting and worker.ready and not worker.busy:
                    worker.give(waiting.popleft())
    finally:
        for worker in running:
            worker.kill()
    return lost


def _wait(workers: list["_Worker"]) -> None:
    """Returns when a worker has written something or died, or its time is over."""
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker.output, selectors.EVENT_READ)
        first = min(worker.deadline for worker in workers)
        selector.select(max(0.0, first - time.monotonic()))


@contextlib.contextmanager
def _stopping_blocked() -> Iterator[None]:
    """A process that is started inside never gets the signals that ask a run to stop.

    Who stops a run may signal all of its processes; a worker that died of it would turn its answer
    wrong. It ends with its input, or is killed.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker:
    """A grading process and the job it has.

    Attributes:
      output: file descriptor that becomes readable when it has written something, or died.
      ready: it has started.
      deadline: by the monotonic clock, of its start or of its job; infinite while it has none.
    """

    def __init__(self, seconds: float) -> None:
        package_root = str(pathlib.Path(__file__).parents[2])
        paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        with _stopping_blocked():
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "opsdc_jax.grading.worker", str(seconds), str(MEMORY)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                process_group=0,  # Ctrl-C in a terminal is for the run alone
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0"},
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input = self._process.stdin
        self._output = self._process.stdout
        self.output = self._output.fileno()
        os.set_blocking(self.output, False)
        self.ready = False
        self.deadline = time.monotonic() + _START_SECONDS
        self._seconds = seconds
        self._unread, self._dead = b"", False
        self._pairs: deque[tuple[str, str]] = deque()

    @property
    def busy(self) -> bool:
        """Whether a verdict is still to come."""
        return bool(self._pairs)

    def give(self, job: _Job) -> None:
        """Starts a job; its time runs from now."""
        self._pairs.extend((answer, job.gold) for answer in job.answers)
        self.deadline = time.monotonic() + self._seconds
        line = json.dumps({"gold": job.gold, "answers": job.answers}) + "\n"
        with contextlib.suppress(BrokenPipeError):  # it has just died: `failed` will tell
            self._input.write(line.encode())
            self._input.flush()

    def verdicts(self) -> dict[tuple[str, str], bool | None]:
        """The verdicts that have come in since the last call; does not wait."""
        try:
            written = os.read(self.output, 1 << 16)
        except BlockingIOError:
            return {}
        self._dead = not written
        *lines, self._unread = (self._unread + written).split(b"\n")
        if lines and not self.ready:
            self.ready, lines = True, lines[1:]
        found: dict[tuple[str, str], bool | None] = {}
        for line in lines:
            found[self._pairs.popleft()] = line == b"true"
        if self.ready and not self._pairs:
            self.deadline = math.inf
        return found

    def failed(self) -> bool:
        """Whether the process has died or its time is over.

        Raises:
          RuntimeError: it never started.
        """
        failed = self._dead or time.monotonic() >= self.deadline
        if failed and not self.ready:
            raise RuntimeError(
                f"a grading worker could not be started in {_START_SECONDS:.0f} s: "
                f"try {sys.executable} -m opsdc_jax.grading.worker 1 {MEMORY} < /dev/null"
            )
        return failed

    def kill(self) -> set[tuple[str, str]]:
        """Ends the process; returns the pairs it has not answered."""
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._input.close()
        self._output.close()
        return set(self._pairs)
