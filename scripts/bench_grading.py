"""Time of grading: python scripts/bench_grading.py [--cases FILE] [--gradings N] [--workers 2]

Grades responses of a realistic shape: a thought, a sentence, and an answer line, a box or both.
FILE holds one JSON object {"answer": ..., "gold": ...} a line; without it the answers are built
in, right ones and generated wrong ones. Then one answer that sympy never finishes with. Prints two
JSON objects:
  seconds         of all gradings, the start of the workers included
  cpu_seconds     processor time of all workers, the same on a busy machine
  compared        how many different (answer, gold) pairs they held
  over_limit      seconds that the hanging answer took beyond its limit, a worker's start included
"""

import json
import pathlib
import random
import resource
import sys
import time
from collections.abc import Sequence

from absl import flags

from opsdc_jax import cli, grading
from opsdc_jax.config import InputError

HANGING = "9^{9^{9^9}}"
_THOUGHT = "Okay, let me think. The first number is 3, so \\boxed{3} would be one idea. Wait. " * 60


def main(argv: Sequence[str]) -> int:
    """Grades and prints."""
    values = flags.FlagValues()
    define = {"flag_values": values}
    flags.DEFINE_string("cases", None, "jsonl file of answers and golds", **define)
    flags.DEFINE_integer("gradings", 10_000, "how many", lower_bound=1, **define)
    flags.DEFINE_integer("workers", 2, "worker processes", lower_bound=1, **define)
    args = cli.parse(values, argv)
    rng = random.Random(0)
    pairs = read_pairs(args.cases) if args.cases else built_in_pairs(rng, args.gradings)
    pairs = [pairs[index % len(pairs)] for index in range(args.gradings)]
    items = [(response(answer, rng), gold, False) for answer, gold in pairs]
    began = time.perf_counter()
    grades = grading.grade_many(items, workers=args.workers)
    seconds = time.perf_counter() - began
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    report = {
        "benchmark": "grading",
        "gradings": len(items),
        "compared": len(set(pairs)),
        "workers": args.workers,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(children.ru_utime + children.ru_stime, 2),
        "right": sum(grade.scores["committed"] for grade in grades),
        "timed_out": sum(grade.timed_out for grade in grades),
    }
    print(json.dumps(report))
    began = time.perf_counter()
    (grade,) = grading.grade_many([(f"Answer: {HANGING}", "\\sqrt{2}", False)], workers=1)
    over = time.perf_counter() - began - grading.SECONDS
    report = {"benchmark": "grading_hang", "limit": grading.SECONDS, "over_limit": round(over, 2)}
    print(json.dumps(report | {"timed_out": grade.timed_out}))
    return cli.EXIT_DONE


def read_pairs(path: str) -> list[tuple[str, str]]:
    """(answer, gold) of every line."""
    try:
        rows = [json.loads(line) for line in pathlib.Path(path).read_text().splitlines() if line]
        return [(str(row["answer"]), str(row["gold"])) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f'--cases {path} must hold {{"answer": ..., "gold": ...}} on every line: {error}'
        ) from None


def built_in_pairs(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Golds of the forms that benchmarks have, each with a right or a wrong answer."""
    pairs = []
    for index in range(count):
        a, b, c = rng.randint(2, 99), rng.randint(2, 99), rng.choice([2, 3, 5, 7, 11, 13])
        forms = [
            (f"{a * b}", f"{a * b}"),
            (f"\\dfrac{{{a}}}{{{b}}}", f"\\frac{{{a}}}{{{b}}}"),
            (f"\\sqrt{{{a * a * c}}}", f"{a}\\sqrt{{{c}}}"),
            (f"{b} + {a}x^2 - x", f"{a}x^2 - x + {b}"),
            (f"({a}, \\pi/{b})", f"\\left( {a}, \\frac{{\\pi}}{{{b}}} \\right)"),
            (f"{a}\\pi + {b}", f"{b} + {a}\\pi"),
            (f"{b}i + {a}", f"{a}+{b}i"),
            (f"x = {a} \\pm {b}\\sqrt{{{c}}}", f"{a} \\pm {b}\\sqrt{{{c}}}"),
        ]
        answer, gold = forms[index % len(forms)]
        if rng.random() < 0.4:
            answer = answer.replace(str(a), str(a + 1)) if str(a) in answer else f"{answer}+1"
        pairs.append((answer, gold))
    return pairs


def response(answer: str, rng: random.Random) -> str:
    """A response of about 5,000 characters that ends in an answer."""
    box = f"$\\boxed{{{answer}}}$"
    endings = (f"Answer: {answer}", f"So {box}.", f"{box}\n\nAnswer: {answer}")
    return f"<think>\n{_THOUGHT}\n</think>\n\nIt follows at once. {rng.choice(endings)}"


if __name__ == "__main__":
    sys.exit(cli.run(main))
