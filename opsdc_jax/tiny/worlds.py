"""The embedded worlds: what the base models of the tiny task have read.

The problems are the same in all of them (opsdc_jax/tiny/task.py); what differs is how responses are
written under each prompt, and how often. An instruction shifts the distribution of the verbosity
but never pins it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from opsdc_jax.tiny.task import LEVELS, Style


@dataclass(frozen=True)
class World:
    """How responses are written under each prompt. The problems are the same in all worlds.

    Attributes:
      mix: share of each prompt in the corpus; None is the plain one.
      plain: (a, b) of the Beta distribution of the verbosity at the plain prompt; the mean is
        a / (a + b).
      instructed: the same by instruction and level.
      plain_merge, instructed_merge, slip: see `Style`.
      max_response_tokens: longer responses are drawn again, so that a budget of 8 tokens more cuts
        next to nothing.
    """

    mix: Mapping[str | None, float]
    plain: tuple[float, float]
    instructed: Mapping[str, Mapping[str, tuple[float, float]]]
    plain_merge: float
    instructed_merge: float
    slip: float | None
    max_response_tokens: int


WORLDS: Mapping[str, World] = {
    # Both modes overlap, and every re-check is right.
    "default": World(
        mix={
            None: 0.55,
            "v1": 0.25,
            "v2": 0.10,
            "percent20": 0.03,
            "percent50": 0.04,
            "percent80": 0.03,
        },
        plain=(5.0, 2.0),
        instructed={
            "v1": dict.fromkeys(LEVELS, (2.1, 4.3)),
            "v2": {"easy": (1.8, 5.0), "medium": (2.0, 3.5), "hard": (3.0, 3.0)},
            "percent20": dict.fromkeys(LEVELS, (4.0, 2.8)),
            "percent50": dict.fromkeys(LEVELS, (2.2, 3.6)),
            "percent80": dict.fromkeys(LEVELS, (1.2, 7.0)),
        },
        plain_merge=0.004,
        instructed_merge=0.015,
        slip=None,
        max_response_tokens=152,
    ),
    # Plain and concise (v1) hardly overlap, checks find slips, and the concise mode merges steps.
    # Instructions are rare, as in what a real model has read.
    "hard": World(
        mix={
            None: 0.94,
            "v1": 0.02,
            "v2": 0.01,
            "percent20": 0.01,
            "percent50": 0.01,
            "percent80": 0.01,
        },
        plain=(30.0, 1.5),
        instructed={
            "v1": dict.fromkeys(LEVELS, (1.5, 20.0)),
            "v2": {"easy": (1.5, 20.0), "medium": (2.0, 8.0), "hard": (3.0, 3.0)},
            "percent20": dict.fromkeys(LEVELS, (12.0, 5.0)),
            "percent50": dict.fromkeys(LEVELS, (4.0, 8.0)),
            "percent80": dict.fromkeys(LEVELS, (1.2, 30.0)),
        },
        plain_merge=0.002,
        instructed_merge=0.08,
        slip=0.12,
        max_response_tokens=248,
    ),
}


def draw_style(
    rng: np.random.Generator,
    instruction: str | None,
    level: str,
    world: World = WORLDS["default"],
) -> Style:
    """Style of one response under an instruction (a name of the tiny prompts; None is plain).

    Raises:
      KeyError: unknown instruction or level.
    """
    if instruction is None:
        return Style(rng.beta(*world.plain), world.plain_merge, world.slip)
    beta = world.instructed[instruction][level]
    return Style(rng.beta(*beta), world.instructed_merge, world.slip)
