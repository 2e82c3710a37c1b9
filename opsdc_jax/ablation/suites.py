"""The suites: which variants of a configuration are compared. Data, and how runs are named.

A variant is a few overrides of the configuration. Values are shares of the configuration's own, so
that the same suite fits the tiny task and Qwen3: M / 2 is 10 for configs/tiny.py and 25 for the
paper's M = 50. A variant whose overrides change nothing is the configuration itself, and variants
with the same overrides are one run, whichever suites they stand in.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from opsdc_jax.config import InputError, flatten, unknown_key

DEFAULT = "default"
"""The run of the configuration itself."""

Overrides = Mapping[str, Any]


class Variant(NamedTuple):
    """What is changed: a name that tables and claims use, and values of dotted keys."""

    name: str
    overrides: Overrides


class Suite(NamedTuple):
    """Variants that stand side by side, and the question that they answer."""

    question: str
    variants: list[Variant]


def suites(base: ConfigDict) -> dict[str, Suite]:
    """All suites of a configuration, by name."""
    every, budget, lr = base.teacher.every, base.sampler.max_response_tokens, base.optim.lr
    # A moving average in bfloat16 would lose its small steps.
    ema = {"teacher.every": 1, "teacher.decay": 0.95, "model.teacher_dtype": "float32"}
    return {
        "method": Suite(
            "Does the method do what the paper says, with the configuration as it is?",
            [Variant(DEFAULT, {})],
        ),
        "divergence": Suite(
            "Which divergence between student and teacher?",
            [
                Variant("reverse KL", {"loss.divergence": "reverse_kl"}),
                Variant("forward KL", {"loss.divergence": "forward_kl"}),
                Variant("JSD", {"loss.divergence": "jsd"}),
            ],
        ),
        "teacher": Suite(
            "How often is the teacher refreshed (M)?",
            [
                Variant("M = 1", {"teacher.every": 1}),
                Variant("M / 5", {"teacher.every": max(1, every // 5)}),
                Variant("M / 2", {"teacher.every": max(1, every // 2)}),
                Variant("M", {"teacher.every": every}),
                Variant("frozen", {"teacher.every": 0}),
                Variant("EMA", ema),
            ],
        ),
        "instruction": Suite(
            "Which instruction does the teacher get?",
            [
                Variant(name, {"prompts.instruction": name})
                for name in ("v1", "v2", "percent20", "percent50", "percent80", "none")
            ],
        ),
        "rollout": Suite(
            "How long may a training rollout be?",
            [
                Variant(f"{percent}%", {"sampler.max_response_tokens": budget * percent // 100})
                for percent in (20, 30, 40, 60, 100)
            ],
        ),
        "temperature": Suite(
            "At which temperature are rollouts sampled?",
            [Variant(f"T = {t}", {"sampler.temperature": t}) for t in (0.3, 0.6, 1.0, 1.5)],
        ),
        "lr": Suite(
            "How large are the steps?",
            [Variant(f"lr x {by:g}", {"optim.lr": lr * by}) for by in (0.25, 0.5, 1.0, 2.0, 4.0)],
        ),
        "normalisation": Suite(
            "What is the loss a mean of?",
            [
                Variant("tokens", {"loss.weights": "tokens"}),
                Variant("sequences", {"loss.weights": "sequences"}),
                Variant("micro-batches", {"loss.weights": "micro_batches"}),
            ],
        ),
        "options": Suite(
            "What do the options beyond the paper do?",
            [
                Variant(DEFAULT, {}),
                Variant("EMA", ema),
                Variant("top-k 5", {"loss.top_k": 5}),
                Variant("top-k 20", {"loss.top_k": 20}),
                Variant("sequences", {"loss.weights": "sequences"}),
                Variant("only correct", {"loss.only_correct": True}),
                Variant("anchor 0.1", {"loss.anchor": 0.1}),
                Variant("anchor 1", {"loss.anchor": 1.0}),
            ],
        ),
        "baselines": Suite(
            "What do the alternatives do that the paper argues against?",
            [
                Variant("OPSDC", {}),
                Variant(
                    "SFT",
                    {
                        "sampler.policy": "teacher",
                        "teacher.every": 0,
                        "loss.divergence": "nll",
                        "optim.lr": lr / 2,  # the best of three: docs/LOG.md
                    },
                ),
                Variant(
                    "policy gradient",
                    {
                        "loss.divergence": "nll",
                        "loss.weights": "advantages",
                        "loss.length_penalty": 0.5,
                    },
                ),
            ],
        ),
    }


def chosen(names: str, base: ConfigDict) -> dict[str, Suite]:
    """The suites that `--suite` names, separated by commas.

    Raises:
      InputError: one is unknown, or compares a run with itself.
    """
    known = suites(base)
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in known:
            raise InputError(f"--suite={name} is not one of {', '.join(known)}")
        _check_distinct(name, known[name], base)
    return {name: known[name] for name in wanted}


def _check_distinct(name: str, suite: Suite, base: ConfigDict) -> None:
    names: dict[str, str] = {}
    for variant in suite.variants:
        other = names.setdefault(run_name(base, variant.overrides), variant.name)
        if other != variant.name:
            values = ", ".join(f"{key}={flatten(base)[key]}" for key in variant.overrides)
            raise InputError(
                f"--suite={name}: {other!r} and {variant.name!r} are one run with {values}; set "
                "another value"
            )


def changes(base: ConfigDict, overrides: Overrides) -> dict[str, Any]:
    """The overrides that change something, sorted.

    Raises:
      InputError: a key is unknown.
    """
    flat = flatten(base)
    for key in overrides:
        if key not in flat:
            raise InputError(unknown_key(key))
    return {key: value for key, value in sorted(overrides.items()) if value != flat[key]}


def run_name(base: ConfigDict, overrides: Overrides) -> str:
    """Name of a variant's runs: what it changes, so that equal variants are one."""
    changed = changes(base, overrides)
    return ",".join(f"{key}={value}" for key, value in changed.items()) or DEFAULT


def applied(base: ConfigDict, overrides: Overrides) -> ConfigDict:
    """A copy of a configuration with the overrides in it."""
    settings = ConfigDict(base.to_dict())
    settings.update_from_flattened_dict(changes(base, overrides))
    return settings
