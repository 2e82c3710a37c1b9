"""Kills a run again and again, and compares it bit for bit with one that nobody disturbed.

    python scripts/soak.py [--kills 50] [--gap 15,45] [--seed 0] [--out runs/soak]

Two runs of configs/tiny.py with the same settings start at the same time, each on its own half of
the processors. One is ended by SIGKILL or SIGTERM at random, `--gap` seconds after its start, and
started again, until the kills are spent. Then it goes on to the next step that is a multiple of
`--compare_every`, where both have a checkpoint. Up to there everything must be equal: student,
teacher and optimizer, all rows of metrics.jsonl but their timings, samples/ and eval/. The
undisturbed run's memory must not grow by more than 5% after its first third, and no SIGTERM take
over 30 s to end a run.

Prints one JSON object a line, also to soak.jsonl in --out: one for each kill (`step`: the last in
metrics.jsonl; `continued_from`: the checkpoint it had started from), and the verdict. What the runs
print goes to undisturbed.log and killed.log.

Exit codes: 0 equal; 1 something differs, grew, or ended as it should not; 2 bad input.
"""

import dataclasses
import json
import pathlib
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import flags

from opsdc_jax import cli, processes
from opsdc_jax.config import InputError
from opsdc_jax.metrics import read_metrics
from opsdc_jax.progress import TIMES

ROOT = pathlib.Path(__file__).parent.parent

# Endless for our purposes; slow enough that the student still answers after thousands of steps.
SETTINGS = (
    "train.steps=1000000",
    "teacher.every=200",
    "optim.lr=1e-5",
    "eval.samples_per_level=16",
    "eval.batch_size=16",
    "guards.action=warn",
    "checkpoint.every_steps=5",
)
LONGEST_END = 30.0  # seconds from SIGTERM to the end: a step, or a batch, and a checkpoint
MOST_GROWTH = 0.05  # of the undisturbed run's resident memory
POLL = 0.2  # seconds between two looks at a run
LAST_ROWS = 8192  # bytes at the end of metrics.jsonl that hold a whole row at least
RSS_EVERY = 10.0  # seconds between two readings of its memory
RSS_LEAST = 60  # readings below which nothing is said of growth
PATIENCE = 600.0  # seconds without a new step, or without obeying, after which a run is stuck


class SoakError(Exception):
    """A run did what it must not; the message is the verdict."""


@dataclasses.dataclass
class Run:
    """One of the two runs: a folder, and the process that works on it.

    Attributes:
      processors: numbers of those it may use: as many for both runs, since the number of threads
        decides how sums are split.
      longest_end: seconds, the longest that it took to end on SIGTERM.
    """

    folder: pathlib.Path
    processors: set[int]
    overrides: Sequence[str]
    process: subprocess.Popen | None = None
    log_start: int = 0
    started: float = 0.0
    first_step: int = 0
    longest_end: float = 0.0

    @property
    def log(self) -> pathlib.Path:
        return self.folder.with_suffix(".log")

    def start(self, *more: str) -> None:
        """Starts or continues it."""
        command = [sys.executable, str(ROOT / "scripts" / "train.py")]
        command += ["--config", str(ROOT / "configs" / "tiny.py"), "--workdir", str(self.folder)]
        command += [f"--config.{override}" for override in (*SETTINGS, *self.overrides, *more)]
        self.log_start = self.log.stat().st_size if self.log.exists() else 0
        self.started, self.first_step = time.monotonic(), self.step()
        self.process = processes.start(command, self.log, self.processors)

    def step(self) -> int:
        """The last step in metrics.jsonl, 0 without one; it reads the end of the file only."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return 0
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - LAST_ROWS, 0))
            _, *whole, _ = (b"\n" + file.read()).split(b"\n")
        return json.loads(whole[-1])["step"] if whole else 0

    def printed(self) -> str:
        """What the newest process printed so far."""
        return self.log.read_bytes()[self.log_start :].decode(errors="replace")

    def check_alive(self) -> None:
        """Raises SoakError if it ended by itself."""
        assert self.process is not None
        if self.process.poll() is not None:
            raise SoakError(
                f"{self.folder.name} ended by itself with exit code {self.process.returncode}: "
                f"{self.printed()[-2000:]}"
            )

    def end(self, number: signal.Signals) -> int:
        """Sends a signal, waits for the process's end, and returns its exit code."""
        assert self.process is not None
        began = time.monotonic()
        self.process.send_signal(number)
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise SoakError(f"{self.folder.name} did not end on {number.name}") from None
        if number is signal.SIGTERM:
            self.longest_end = max(self.longest_end, round(time.monotonic() - began, 1))
        return code

    def rss(self) -> int:
        """Resident memory in KiB."""
        assert self.process is not None
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        found = re.search(r"^VmRSS:\s+(\d+)", status, re.MULTILINE)
        return int(found[1]) if found else 0


class Memory:
    """Readings of a run's resident memory.

    Attributes:
      readings: (step, KiB), from the first step on.
    """

    def __init__(self, run: Run):
        self._run, self._next = run, 0.0
        self.readings: list[tuple[int, int]] = []

    def look(self) -> None:
        """Takes a reading if it is time for one."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + RSS_EVERY
            self._run.check_alive()
            if step := self._run.step():
                self.readings.append((step, self._run.rss()))

    def verdict(self) -> dict[str, Any]:
        """Medians at both ends of what lies behind the first third, and their growth."""
        after = self.readings[len(self.readings) // 3 :]
        tenth = max(1, len(after) // 10)
        start, end = (
            statistics.median(rss for _, rss in part) if part else 0
            for part in (after[:tenth], after[-tenth:])
        )
        return {
            "rss_readings": len(self.readings),
            "rss_from_step": after[0][0] if after else None,
            "rss_start_mib": round(start / 1024, 1),
            "rss_end_mib": round(end / 1024, 1),
            "rss_growth": (round(end / start - 1, 4) if len(self.readings) >= RSS_LEAST else None),
        }


def main(argv: Sequence[str]) -> int:
    """Runs both, kills one, compares."""
    values = flags.FlagValues()
    define: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_integer("kills", 50, "how often the run is killed", 1, **define)
    flags.DEFINE_list("gap", ["15", "45"], "seconds from a start to its kill: from, to", **define)
    flags.DEFINE_integer("seed", 0, "of times and signals", 0, **define)
    flags.DEFINE_integer("compare_every", 50, "steps between two that can be compared", 1, **define)
    flags.DEFINE_string("out", "runs/soak", "folder of both runs, which must be new", **define)
    flags.DEFINE_multi_string("set", [], "a key of the configuration, KEY=VALUE", **define)
    args = cli.parse(values, argv)
    try:
        low, high = map(float, args.gap)
    except ValueError:
        raise InputError(f"--gap={','.join(args.gap)} must be two numbers: --gap 15,45") from None
    out = pathlib.Path(args.out)
    if out.exists():
        raise InputError(f"{out} exists already: choose another --out")
    out.mkdir(parents=True)

    with (out / "soak.jsonl").open("a", encoding="utf-8") as log:

        def tell(row: dict[str, Any]) -> None:
            for file in (sys.stdout, log):
                print(json.dumps(row), file=file, flush=True)

        one_half, other_half = processes.shares(2)
        often = f"checkpoint.every_steps={args.compare_every}"
        kept = [*args.set, often, "checkpoint.keep=100000"]
        calm = Run(out / "undisturbed", one_half, kept)
        killed = Run(out / "killed", other_half, args.set)
        memory = Memory(calm)
        began = time.monotonic()
        verdict: dict[str, Any] = {"kills": args.kills}
        try:
            calm.start()
            for row in kill(killed, memory, args.kills, (low, high), random.Random(args.seed)):
                tell(row)
            step = finish(calm, killed, memory, args.compare_every)
            verdict |= {"step": step} | differences(calm.folder, killed.folder, step)
            verdict |= memory.verdict()
            longest = verdict["longest_end_s"] = max(calm.longest_end, killed.longest_end)
            passes = grew_little(verdict["rss_growth"]) and longest <= LONGEST_END
            verdict["passed"] = passes and not verdict["differ"]
        except (SoakError, InputError) as error:
            verdict |= {"passed": False, "error": str(error)}
        finally:
            for run in (calm, killed):
                if run.process is not None and run.process.poll() is None:
                    run.process.kill()
                    run.process.wait()
        tell(verdict | {"seconds": round(time.monotonic() - began)})
    return cli.EXIT_DONE if verdict["passed"] else cli.EXIT_FAILED


def kill(
    run: Run, memory: Memory, kills: int, gap: tuple[float, float], drawn: random.Random
) -> Iterator[dict[str, Any]]:
    """Starts and kills a run `kills` times; yields what is to be told of each.

    After a kill that came before a new step, the next gap counts from one: the run gets on even
    where a start takes longer than a gap.

    Raises:
      SoakError: the run ended by itself, got stuck, or ended otherwise than asked.
    """
    got_on = True
    for number in range(1, kills + 1):
        seconds, asked = drawn.uniform(*gap), drawn.choice((signal.SIGKILL, signal.SIGTERM))
        run.start()
        if not got_on:
            wait_for_step(run, run.first_step + 1, memory)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(POLL)
            run.check_alive()
            memory.look()
        after, step = time.monotonic() - run.started, run.step()
        code = run.end(asked)
        found = re.search(r"continuing after step (\d+)", run.printed())
        yield {
            "kill": number,
            "signal": asked.name,
            "after_s": round(after, 1),
            "step": step,
            "exit_code": code,
            "ended_in_s": round(time.monotonic() - run.started - after, 1),
            "continued_from": int(found[1]) if found else None,
        }
        if code not in right_ends(asked, run.printed()):
            raise SoakError(f"{asked.name} gave exit code {code}: {run.printed()[-2000:]}")
        got_on = step > run.first_step


def right_ends(asked: signal.Signals, printed: str) -> tuple[int, ...]:
    """Exit codes that are right after a signal.

    SIGTERM itself may end a process that still loads its libraries, and has printed nothing.
    """
    if asked is signal.SIGKILL:
        return (-signal.SIGKILL,)
    return (cli.EXIT_STOPPED,) if printed else (cli.EXIT_STOPPED, -signal.SIGTERM)


def finish(calm: Run, killed: Run, memory: Memory, every: int) -> int:
    """Goes on until both runs hold a checkpoint of the same step, which is returned."""
    killed.start(f"checkpoint.every_steps={every}", "checkpoint.keep=100000")
    step = (max(killed.step(), 1) + every - 1) // every * every
    for run in (killed, calm):
        # A step more: a checkpoint is begun after the step's row is written.
        wait_for_step(run, step + 1, memory)
    for run in (killed, calm):
        code = run.end(signal.SIGTERM)
        if code != cli.EXIT_STOPPED:
            raise SoakError(f"{run.folder.name} gave exit code {code}: {run.printed()[-2000:]}")
    return step


def wait_for_step(run: Run, step: int, memory: Memory) -> None:
    """Returns when a run has written a step.

    Raises:
      SoakError: it ended, or wrote no step for too long.
    """
    last, since = run.step(), time.monotonic()
    while last < step:
        time.sleep(POLL)
        run.check_alive()
        memory.look()
        if (now := run.step()) != last:
            last, since = now, time.monotonic()
        if time.monotonic() - since > PATIENCE:
            raise SoakError(f"{run.folder.name} is stuck at step {last}")


def grew_little(growth: float | None) -> bool:
    """Whether memory stayed within its limit; a run too short to say has not failed."""
    return growth is None or growth <= MOST_GROWTH


def differences(calm: pathlib.Path, killed: pathlib.Path, step: int) -> dict[str, Any]:
    """What two runs' folders hold up to a step, compared.

    Returns:
      `differ`: a line for each thing that is not equal, and how much was compared.
    """
    differ: list[str] = []
    rows = [
        [row for row in read_metrics(folder / "metrics.jsonl") if row["step"] <= step]
        for folder in (calm, killed)
    ]
    for folder, of_run in zip((calm, killed), rows, strict=True):
        steps = [row["step"] for row in of_run]
        if steps != list(range(1, step + 1)):
            differ.append(f"{folder.name}/metrics.jsonl misses or doubles steps: {steps}")
    for ours, theirs in zip(*rows, strict=False):
        for key in sorted(ours.keys() | theirs.keys()):
            # As text: two numbers that are none are equal here.
            if key not in TIMES and json.dumps(ours.get(key)) != json.dumps(theirs.get(key)):
                differ.append(f"metrics.jsonl, step {ours['step']}, {key}")
    files = [written(folder, step) for folder in (calm, killed)]
    for name in sorted(files[0].keys() | files[1].keys()):
        if files[0].get(name) != files[1].get(name):
            differ.append(name)
    arrays = [checkpoint(folder / "checkpoints" / str(step)) for folder in (calm, killed)]
    bits = 0
    for name in sorted(arrays[0].keys() | arrays[1].keys()):
        ours, theirs = (of_run.get(name, np.zeros(0)) for of_run in arrays)
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            differ.append(f"checkpoint {step}, {name}: another shape")
        elif unequal := differing_bits(ours, theirs):
            bits += unequal
            differ.append(f"checkpoint {step}, {name}: {unequal} bits")
    return {
        "differ": differ,
        "differing_bits": bits,
        "compared_rows": len(rows[0]),
        "compared_files": len(files[0]),
        "compared_arrays": len(arrays[0]),
        "compared_bytes": sum(array.nbytes for array in arrays[0].values()),
    }


def written(folder: pathlib.Path, step: int) -> dict[str, bytes]:
    """The files of samples/ and eval/ that belong to steps up to `step`, by name."""
    found = {}
    for path in sorted([*folder.glob("samples/*"), *folder.glob("eval/*/*")]):
        number = re.search(r"-(\d{6})\.", path.name)  # none: of the base model
        # A half-written .tmp is no result, and is written anew.
        if path.suffix != ".tmp" and (number is None or int(number[1]) <= step):
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def checkpoint(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint, by item and path; read without the code that wrote them."""
    arrays = {}
    for item in ("student", "teacher", "optimizer"):
        tree = ocp.StandardCheckpointer().restore((folder / item).absolute())
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            arrays[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return arrays


def differing_bits(ours: np.ndarray, theirs: np.ndarray) -> int:
    """How many bits of two arrays of one shape and dtype are not the same."""
    flat = [np.frombuffer(array.tobytes(), np.uint8) for array in (ours, theirs)]
    return int(np.bitwise_count(flat[0] ^ flat[1]).sum())


if __name__ == "__main__":
    sys.exit(cli.run(main))
