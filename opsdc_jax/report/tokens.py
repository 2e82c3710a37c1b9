"""The rollouts of the token view: which, cut to what a page can hold, and coloured."""

import bisect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from opsdc_jax.report.run import View

STEPS, ROLLOUTS, TOKENS = 3, 2, 1200  # shown: steps; rollouts of each; tokens of a rollout at most
BOUNDS = (0.01, 0.03, 0.1, 0.3, 1.0)  # nats, where one colour ends and the next begins
_SMALLEST = 0.001  # a choice less probable is left out
# Stand for tokens that are only line breaks, or only space, or a part of a character.
_RETURN, _NO_TEXT = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\N{OPEN BOX}"


class Rollout(NamedTuple):
    """A rollout as the page shows it; a token is (space before, text, space after, colour)."""

    number: int
    problem: str
    note: str
    tokens: list[tuple[str, str, str, int]]


class Step(NamedTuple):
    """The rollouts of one step."""

    title: str
    about: str
    rollouts: list[Rollout]


def select(views: Sequence[View], refreshes: Sequence[int]) -> tuple[list[Step], list[list[Any]]]:
    """The first rollouts of the first, the middle and the last step there is.

    Returns:
      The steps, and for every rollout the choices of each of its tokens, as page.js reads them.
    """
    count = min(STEPS, len(views))
    chosen = [views[round(i * (len(views) - 1) / max(count - 1, 1))] for i in range(count)]
    steps: list[Step] = []
    choices: list[list[Any]] = []
    for view in chosen:
        rollouts = []
        for rollout in view.rollouts[:ROLLOUTS]:
            rollouts.append(_rollout(len(choices), rollout))
            choices.append([_choices(rollout, at) for at in range(len(rollouts[-1].tokens))])
        steps.append(Step(f"Step {view.step}", _about(view.step, refreshes), rollouts))
    return steps, choices


def _about(step: int, refreshes: Sequence[int]) -> str:
    before = [refresh for refresh in refreshes if refresh < step]
    student = "The base model itself" if step == 1 else f"The student after {step - 1} updates"
    teacher = f"the student of step {before[-1]}" if before else "the base model"
    return f"{student}; the teacher is {teacher}, under the instruction."


def _rollout(index: int, rollout: Mapping[str, Any]) -> Rollout:
    length = len(rollout["tokens"])
    note = f"{length:,} tokens"
    if length > TOKENS:
        note += f", of which the first {TOKENS:,} are shown"
    if not rollout["stopped"]:
        note += ", cut by the budget"
    pieces = zip(rollout["tokens"][:TOKENS], rollout["kl"], strict=False)
    tokens = [(*_visible(text), bisect.bisect_right(BOUNDS, kl)) for text, kl in pieces]
    return Rollout(index, rollout["problem"], note, tokens)


def _visible(text: str) -> tuple[str, str, str]:
    """A token as space, text to point at, space: there is always something to point at."""
    word = text.strip()
    if word:
        before, _, after = text.partition(word)
        return before, word, after
    return "", _RETURN if "\n" in text else _NO_TEXT, text


def _choices(rollout: Mapping[str, Any], at: int) -> list[Any]:
    def top(side: str) -> list[list[Any]]:
        return [pair for pair in rollout[side][at] if pair[1] >= _SMALLEST]

    return [
        rollout["tokens"][at],
        f"{max(rollout['kl'][at], 0.0):.3f}",  # float32 rounds some zeros to below
        [f"{rollout[side][at]:.2f}" for side in ("student_entropy", "teacher_entropy")],
        [float(f"{rollout[side][at]:.3g}") for side in ("student_prob", "teacher_prob")],
        top("student_top"),
        top("teacher_top"),
    ]


def heat_labels() -> list[str]:
    """What each colour means, in nats."""
    edges = [f"{bound:g}" for bound in BOUNDS]
    between = [f"{low} to {high}" for low, high in itertools.pairwise(edges)]
    return [f"below {edges[0]} nats", *between, f"above {edges[-1]}"]
