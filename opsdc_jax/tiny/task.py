"""The embedded reasoning task: a chain of operations mod 100, and responses with a verbosity dial.

A problem reads `start 33 + 9 - 2 + 3`: apply the operations from left to right, keeping the last
two digits. A response looks like one of a reasoning model: essential steps (`33 + 9 = 42 .`) among
fillers (openings, restatements, plans, re-checks), then `</think> Answer : 43`. One latent number
per response, its verbosity, sets how likely every filler is. opsdc_jax/tiny/worlds.py says how an
instruction in the prompt shifts its distribution.

Everything is a pure function of (seed, index). Words are separated by single spaces.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

MODULUS = 100
EVAL_SHARE = 8  # one problem text in this many belongs to evaluation
LEVELS: Mapping[str, tuple[int, ...]] = {"easy": (2,), "medium": (3, 4), "hard": (5, 6)}
"""Level -> the possible numbers of operations."""

# Random streams: the same (seed, index) means another problem in each of them.
_STREAMS = {"pretrain": 0, "drill": 1, "train": 2, "eval": 3}
_OPERATORS = ("+", "-", "*")
_OPERATOR_PROBABILITIES = (0.4, 0.4, 0.2)
# First operand and one past the last; * stays small, or its table would dwarf the other two.
_OPERANDS = {"+": (2, 10), "-": (2, 10), "*": (2, 4)}


def apply(operator: str, left: int, right: int) -> int:
    """`left operator right`, mod 100, in 0..99."""
    if operator == "+":
        return (left + right) % MODULUS
    if operator == "-":
        return (left - right) % MODULUS
    if operator == "*":
        return (left * right) % MODULUS
    raise ValueError(f"unknown operator {operator!r}")


@dataclass(frozen=True)
class Problem:
    """One problem: `start`, then `operations` = ((operator, operand), ...) from left to right."""

    start: int
    operations: tuple[tuple[str, int], ...]
    level: str

    @property
    def text(self) -> str:
        """The problem as the model reads it."""
        chain = " ".join(f"{operator} {operand}" for operator, operand in self.operations)
        return f"start {self.start} {chain}"

    @property
    def values(self) -> tuple[int, ...]:
        """The running values: the start, then one after each operation."""
        values = [self.start]
        for operator, operand in self.operations:
            values.append(apply(operator, values[-1], operand))
        return tuple(values)

    @property
    def answer(self) -> str:
        """The last running value, as the word that stands in the answer line."""
        return str(self.values[-1])


def is_eval_text(text: str) -> bool:
    """Whether a problem text belongs to evaluation: decided by a checksum of the text alone.

    So no problem is ever both trained on and evaluated on, whatever the seeds.
    """
    return zlib.crc32(text.encode()) % EVAL_SHARE == 0


def make_problem(seed: int, index: int, *, split: str, level: str | None = None) -> Problem:
    """Problem number `index` of a stream: a pure function of its arguments.

    Args:
      seed, index: non-negative integers.
      split: "pretrain", "drill", "train" (all from the training texts) or "eval" (the others).
      level: "easy", "medium" or "hard"; None draws one of the three with equal probability.

    Raises:
      ValueError: unknown split or level.
    """
    if split not in _STREAMS:
        raise ValueError(f"split {split!r} is not one of {', '.join(_STREAMS)}")
    if level is not None and level not in LEVELS:
        raise ValueError(f"level {level!r} is not one of {', '.join(LEVELS)}")
    rng = np.random.default_rng([seed, _STREAMS[split], index])
    if level is None:
        level = str(rng.choice(list(LEVELS)))
    while True:
        problem = _draw_problem(rng, level)
        if is_eval_text(problem.text) == (split == "eval"):
            return problem


def _draw_problem(rng: np.random.Generator, level: str) -> Problem:
    operations = []
    for _ in range(rng.choice(LEVELS[level])):
        operator = str(rng.choice(_OPERATORS, p=_OPERATOR_PROBABILITIES))
        operations.append((operator, int(rng.integers(*_OPERANDS[operator]))))
    return Problem(int(rng.integers(MODULUS)), tuple(operations), level)


@dataclass(frozen=True)
class Style:
    """How a response is written.

    Attributes:
      verbosity: in [0, 1]; the probability of each filler (scaled, see `write_response`).
      merge: probability that two neighbouring operations are done in one step. Merging saves
        tokens and is what costs accuracy, since the model then computes two results at once.
      slip: None, or the probability that a derivation which is about to be checked has a wrong
        step. Then a check is another derivation, and the response goes on until two in a row agree.
    """

    verbosity: float
    merge: float
    slip: float | None = None


# Fillers. {a} {op} {b} {v} stand for a step, {chain} and {steps} for the whole problem.
_OPENINGS = (
    "Okay , let me work through this step by step .",
    "Alright , we need to find the final value here .",
    "Hmm , let me think about this problem .",
    "First , let me look at the whole problem .",
)
_RESTATEMENTS = (
    "The problem says : start at {start} , {steps} .",
    "So we are given {chain} and we want the last value .",
)
_PLANS = (
    "I will go from left to right and keep the last two digits .",
    "The plan is to do one operation at a time .",
    "There is no order of operations to care about here .",
)
_REMARKS = (
    "So now we have {v} .",
    "Wait , {a} {op} {b} is {v} , right .",
    "Let me check : {a} {op} {b} = {v} . Yes .",
)
_RECHECKS = (
    "Let me verify the last steps again : {previous}{a} {op} {b} = {v} . Good .",
    "Hmm , is {v} right ? Well , {a} {op} {b} is {v} , so yes .",
    "Wait a moment , did I miss a step ? No , the value is {v} .",
)
# Of a check that is a derivation: the value before and the new one stand side by side.
_CHECK = "Let me check : {steps} So {before} , now {v} ."
_AGREE, _DISAGREE = "Good .", "No . Let me start again ."
_STEP = "{a} {op} {b} = {v} ."
_MERGED_STEP = "{a} {op} {b} {op2} {b2} = {v} ."
_RESPONSE = "<think> {thoughts} </think> Answer : {v}"

_REMARK_SCALE = 0.4
_FIRST_RECHECK_SCALE = 0.9
_NEXT_RECHECK_SCALE = 0.75
_MAX_RECHECKS = 3
_MAX_SLIPS = 2


def write_response(problem: Problem, style: Style, rng: np.random.Generator) -> str:
    """A response with the right answer to a problem, without the end-of-sequence token.

    With r the verbosity: opening, restatement and plan each appear with probability r, a remark
    follows each step with probability 0.4 r, and a loop of at most 3 re-checks starts with
    probability 0.9 r and goes on with 0.75 r. Every re-check is correct, so whatever a trained
    model gets wrong is its own doing, and a longer trace is more opportunities for that.

    With slips, the response is checked with probability r: see `_checked_derivations`.
    """
    r = style.verbosity
    thoughts = []
    if rng.random() < r:
        thoughts.append(_pick(rng, _OPENINGS))
    if rng.random() < r:
        thoughts.append(_restatement(problem, rng))
    if rng.random() < r:
        thoughts.append(_pick(rng, _PLANS))
    if style.slip is not None:
        if rng.random() < r:
            thoughts += _checked_derivations(problem, style, style.slip, rng)
        else:
            thoughts += _steps(problem, style, rng)
        return _RESPONSE.format(thoughts=" ".join(thoughts), v=problem.answer)
    thoughts += _steps(problem, style, rng)
    if rng.random() < _FIRST_RECHECK_SCALE * r:
        thoughts.append(_recheck(problem, rng))
        for _ in range(_MAX_RECHECKS - 1):
            if rng.random() >= _NEXT_RECHECK_SCALE * r:
                break
            thoughts.append(_recheck(problem, rng))
    return _RESPONSE.format(thoughts=" ".join(thoughts), v=problem.answer)


def _checked_derivations(
    problem: Problem, style: Style, slip: float, rng: np.random.Generator
) -> list[str]:
    """Derivations of the answer until two in a row agree; at most two of them slip.

    After a disagreement the next derivation starts anew, with remarks, and is checked again.
    """
    thoughts: list[str] = []
    before, slips = None, 0
    bare = Style(0.0, style.merge)
    while True:
        values = problem.values
        if slips < _MAX_SLIPS and rng.random() < slip:
            slips += 1
            values = _slipped(problem, {problem.values[-1], before}, rng)
        if before is None:
            thoughts += _steps(problem, style, rng, values)
            before = values[-1]
            continue
        steps = " ".join(_steps(problem, bare, rng, values))
        thoughts.append(_CHECK.format(steps=steps, before=before, v=values[-1]))
        if values[-1] == before:
            return [*thoughts, _AGREE]
        thoughts.append(_DISAGREE)
        before = None


def _slipped(problem: Problem, avoid: set[int | None], rng: np.random.Generator) -> tuple[int, ...]:
    """The running values with one step gone wrong, so that the last is none of `avoid`."""
    while True:
        wrong = int(rng.integers(len(problem.operations)))
        values = list(problem.values[: wrong + 1])
        values.append(int(rng.integers(MODULUS)))
        for operator, operand in problem.operations[wrong + 1 :]:
            values.append(apply(operator, values[-1], operand))
        if values[-1] not in avoid:
            return tuple(values)


def _pick(rng: np.random.Generator, phrases: tuple[str, ...]) -> str:
    return phrases[rng.integers(len(phrases))]


def _restatement(problem: Problem, rng: np.random.Generator) -> str:
    steps = " , ".join(f"then {operator} {operand}" for operator, operand in problem.operations)
    chain = problem.text.removeprefix("start ")
    return _pick(rng, _RESTATEMENTS).format(start=problem.start, steps=steps, chain=chain)


def _fields(
    problem: Problem, step: int, values: tuple[int, ...] | None = None
) -> dict[str, int | str]:
    """Words of operation number `step` (from 0): a op b = v; `values` as in `_steps`."""
    operator, operand = problem.operations[step]
    values = values or problem.values
    return {"a": values[step], "op": operator, "b": operand, "v": values[step + 1]}


def _steps(
    problem: Problem,
    style: Style,
    rng: np.random.Generator,
    values: tuple[int, ...] | None = None,
) -> list[str]:
    """The essential steps, some merged in pairs, some followed by a remark.

    Args:
      values: the running values, if not the right ones.
    """
    thoughts = []
    step = 0
    while step < len(problem.operations):
        if step + 1 < len(problem.operations) and rng.random() < style.merge:
            second = _fields(problem, step + 1, values)
            fields = _fields(problem, step, values) | {"op2": second["op"], "b2": second["b"]}
            thoughts.append(_MERGED_STEP.format(**fields | {"v": second["v"]}))
            step += 2
        else:
            thoughts.append(_STEP.format(**_fields(problem, step, values)))
            step += 1
        if rng.random() < _REMARK_SCALE * style.verbosity:
            thoughts.append(_pick(rng, _REMARKS).format(**_fields(problem, step - 1, values)))
    return thoughts


def _recheck(problem: Problem, rng: np.random.Generator) -> str:
    last = len(problem.operations) - 1
    previous = _STEP.format(**_fields(problem, last - 1)) + " "
    return _pick(rng, _RECHECKS).format(previous=previous, **_fields(problem, last))


def fact_drill(rng: np.random.Generator, facts: int) -> str:
    """`facts` random facts `a op b = v .` in a row: the arithmetic of the task and nothing else."""
    steps = []
    for _ in range(facts):
        operator = str(rng.choice(_OPERATORS, p=_OPERATOR_PROBABILITIES))
        a, b = int(rng.integers(MODULUS)), int(rng.integers(*_OPERANDS[operator]))
        steps.append(_STEP.format(a=a, op=operator, b=b, v=apply(operator, a, b)))
    return " ".join(steps)


def chain_drill(problem: Problem) -> str:
    """A problem's steps and the last two of them again, `problem : steps : last two`.

    Keeping track of the chain and nothing else: every word after the first `:` is determined.
    """
    steps = [_STEP.format(**_fields(problem, step)) for step in range(len(problem.operations))]
    return " ".join([problem.text, ":", *steps, ":", *steps[-2:]])


def vocabulary() -> tuple[str, ...]:
    """Every word of problems and responses, sorted: numbers first, then the rest."""
    phrases = _OPENINGS + _RESTATEMENTS + _PLANS + _REMARKS + _RECHECKS + (_STEP, _RESPONSE)
    words = {word for phrase in phrases for word in phrase.split() if "{" not in word}
    words -= {"<think>", "</think>"}  # special tokens, not words
    words |= {"start", "then", *_OPERATORS}
    return (*map(str, range(MODULUS)), *sorted(words))
