"""Numbers and sentences of the page."""

from collections.abc import Mapping
from typing import Any

from opsdc_jax.report.run import Run
from opsdc_jax.statistics import HEADLINE

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"
RULES = 25  # more refreshes of the teacher than that are not marked in the curves
SYSTEMS = {
    "base": "base",
    "concise_prompt": "base, concise prompt",
    "student": "student",
}


def percent(fraction: float) -> str:
    """74.6%"""
    return f"{100 * fraction:z.1f}%".replace("-", MINUS)


def value(estimate: Mapping[str, Any] | None, scale: float = 1.0, sign: str = "") -> str:
    """An estimate's value with one decimal; a dash where there is none."""
    if estimate is None:
        return DASH
    return f"{scale * estimate['value']:{sign}z,.1f}".replace("-", MINUS)


def interval(estimate: Mapping[str, Any] | None, scale: float = 1.0, sign: str = "") -> str:
    """The ends of an estimate's interval; empty where there is none."""
    if estimate is None or estimate["low"] is None:
        return ""
    low, high = (f"{scale * estimate[end]:{sign}z,.1f}" for end in ("low", "high"))
    return f"{low} to {high}".replace("-", MINUS)


def loss(config: Mapping[str, Any]) -> str:
    """The loss of a run, in words."""
    divergences = {
        "reverse_kl": "Reverse KL to the teacher",
        "forward_kl": "Forward KL to the teacher",
        "jsd": "JSD to the teacher",
        "nll": "Negative log-likelihood of the rollouts",
    }
    weights = {
        "tokens": "mean over the response tokens of a step",
        "sequences": "mean over the rollouts of a step of their own means",
        "micro_batches": "mean over the micro-batches of a step of their own means",
        "advantages": "weighted by advantages, over the response tokens of a step",
    }
    rule = config["loss"].get("weights", "tokens")  # runs from before there was a choice
    return f"{divergences[config['loss']['divergence']]}, {weights[rule]}"


Sentence = list[tuple[str, bool]]  # pieces, and whether they are set off


def lead(run: Run) -> list[Sentence]:
    """What happened in this run, in a sentence or two; worse is said as plainly as better."""
    found = [
        _result(name, results, len(run.benchmarks) > 1)
        for name, results in run.benchmarks.items()
        if "student" in results["systems"] and "base" in results["systems"]
    ]
    if found:
        return found
    if not run.metrics:
        return [[("Nothing was trained yet, so there is nothing to see.", False)]]
    first, last = (
        sum(row["response_tokens"] for row in rows) / len(rows)
        for rows in (run.metrics[:5], run.metrics[-5:])
    )
    accuracy = "was not measured" if run.finished else "is compared at the end"
    return [
        [
            (
                f"Over {_steps(run.last_step)} the training rollouts went from {first:,.1f} to ",
                False,
            ),
            (f"{last:,.1f} tokens", True),
            (f" (means of the first and the last five steps); accuracy {accuracy}.", False),
        ]
    ]


def _steps(count: int) -> str:
    return f"{count:,} step{'s' if count != 1 else ''}"


def _result(name: str, results: Mapping[str, Any], several: bool) -> Sentence:
    step = results["curve"][-1]["step"] if results["curve"] else 0
    base, student = (results["systems"][system]["overall"] for system in ("base", "student"))
    compared = next(
        c["overall"]
        for c in results["comparisons"]
        if (c["system"], c["against"]) == ("student", "base")
    )
    reduction = compared["token_reduction"]["overall"]
    gain = compared["scores"][HEADLINE]
    more = reduction["value"] < 0
    change = f"{abs(100 * reduction['value']):.1f}% {'more' if more else 'fewer'}"
    where = f"On {name}" if several else f"After {_steps(step)}" if step else "Here"
    before, after = (s["tokens"]["mean"]["value"] for s in (base, student))
    sentence = [
        (f"{where} the student answers in {after:,.1f} tokens where the base model takes ", False),
        (f"{before:,.1f}: ", False),
        (change, True),
        (_within(reduction, 100, flip=more), False),
        (". Its accuracy is ", False),
        (percent(student["scores"][HEADLINE]["value"]), True),
        (f" against {percent(base['scores'][HEADLINE]['value'])}: ", False),
    ]
    points = f"{abs(100 * gain['value']):.1f} points {'lower' if gain['value'] < 0 else 'higher'}"
    if gain["low"] is None or gain["low"] <= 0 <= gain["high"]:
        points = f"{points}, which these {compared['problems']:,} problems cannot tell from none"
    return [*sentence, (f"{points}{_within(gain, 100)}.", False)]


def _within(estimate: Mapping[str, Any], scale: float, flip: bool = False) -> str:
    """The interval of an estimate in brackets; flip: of its negative."""
    if estimate["low"] is None:
        return ""
    low, high = (scale * estimate[end] for end in ("low", "high"))
    if flip:
        low, high = -high, -low
    return f" ({low:z.1f} to {high:z.1f})".replace("-", MINUS)


def facts(run: Run) -> list[tuple[str, str]]:
    """The settings one wants to know first."""
    if not run.config:
        return []
    config = run.config
    every, decay = config["teacher"]["every"], config["teacher"].get("decay", 0)
    teacher = f"every {every} steps" if every else "frozen"
    return [
        ("Model", config["model"]["path"]),
        ("Problems", config["data"]["source"]),
        ("Instruction", config["prompts"]["instruction"]),
        ("Loss", loss(config)),
        ("Teacher", f"{teacher}, keeping {decay:g} of itself" if decay else teacher),
        ("Steps", f"{run.last_step:,} of {config['train']['steps']:,}"),
        ("Rollouts a step", f"{config['train']['batch_size']:,}"),
        ("Learning rate", f"{config['optim']['lr']:g}"),
        ("Seed", str(config["seed"])),
    ]


def training_note(run: Run) -> str:
    """What to know about the curves."""
    if not run.config:
        return ""
    every = run.config["teacher"]["every"]
    if run.refreshes:
        steps = "every step" if every == 1 else f"every {every} steps"
        moves = "moves towards" if run.config["teacher"].get("decay") else "takes"
        return (
            f"The teacher {moves} the student's weights {steps}: the dotted lines, if not too many."
        )
    if every:
        return "The teacher has not been refreshed yet: it is the base model."
    return "The teacher is frozen: it is the base model throughout."


def words_note(run: Run) -> str:
    """What the ranking is made of."""
    counts = sorted({len(view.rollouts) for view in run.views})
    rollouts = " or ".join(f"{count:,}" for count in counts)
    return (
        f"All words of the {rollouts} rollouts of a step, by the reverse KL at the point where "
        "they were said. The last two columns are the mean probability that either side gave the "
        "word there: where the teacher's is lower, it would have left the word out more often."
    )


def benchmark_caption(name: str, results: Mapping[str, Any]) -> str:
    """How the numbers of a benchmark came about."""
    base = next(iter(results["systems"].values()))["overall"]
    settings = results["settings"]
    samples = "response" if base["samples"] == 1 else "responses"
    words = [
        f"{name}: {base['problems']:,} problems, {base['samples']:,} {samples} to each",
        f"temperature {settings['temperature']:g}",
        f"budget {settings['max_response_tokens']:,} tokens",
    ]
    return ", ".join(words) + "."
