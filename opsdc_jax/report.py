"""The final table and the plots of a run."""

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

SYSTEM_NAMES = {
    "base": "base, plain prompt",
    "concise_prompt": "base, concise prompt",
    "student": "student, plain prompt",
}
_Z95 = 1.96


def table(summary: Mapping[str, Any]) -> str:
    """The systems side by side: accuracy % / mean response tokens, with 95% half-widths.

    Args:
      summary: contents of eval/summary.json; empty where evaluation was off.
    """
    if not summary:
        return "no evaluation (eval.source is none)"
    systems = [name for name in SYSTEM_NAMES if name in summary]
    levels = _levels(summary)
    rows = [["accuracy % / tokens", *levels, "all (95%)", "length"]]
    base_tokens = summary["base"]["overall"]["tokens"]
    for name in systems:
        by_level, overall = summary[name]["by_level"], summary[name]["overall"]
        change = overall["tokens"] / base_tokens - 1
        rows.append(
            [
                SYSTEM_NAMES[name],
                *(
                    f"{100 * by_level[lv]['accuracy']:.1f} / {by_level[lv]['tokens']:.1f}"
                    for lv in levels
                ),
                f"{100 * overall['accuracy']:.1f} ± {100 * _half(overall, 'accuracy'):.1f} / "
                f"{overall['tokens']:.1f} ± {_half(overall, 'tokens'):.1f}",
                "" if name == "base" else f"{100 * change:+.1f}%",
            ]
        )
    return _align(rows)


class Claim(NamedTuple):
    """A claim of the paper, measured on a run: its words, whether it held, and the figures."""

    name: str
    text: str
    held: bool
    figures: str


def claims(summary: Mapping[str, Any]) -> list[Claim]:
    """What the paper claims of OPSDC, checked on a run's summary.json.

    Accuracy is held if the student's is not below the base's by more than the 95% interval of the
    difference of two independent means.
    """
    base, student = summary["base"], summary["student"]
    change = student["overall"]["tokens"] / base["overall"]["tokens"] - 1
    gain = student["overall"]["accuracy"] - base["overall"]["accuracy"]
    half = math.hypot(_half(base["overall"], "accuracy"), _half(student["overall"], "accuracy"))
    found = [
        Claim("compression", "at least 50% fewer tokens", change <= -0.5, f"{100 * change:+.1f}%"),
        Claim(
            "accuracy_held",
            "accuracy not below the base's",
            gain >= -half,
            f"{100 * gain:+.1f} ± {100 * half:.1f} points",
        ),
    ]
    changes = {
        level: student["by_level"][level]["tokens"] / base["by_level"][level]["tokens"] - 1
        for level in _levels(summary)
    }
    if len(changes) > 1:
        easiest, hardest = next(iter(changes)), list(changes)[-1]
        figures = ", ".join(f"{level} {100 * value:+.0f}%" for level, value in changes.items())
        held = changes[easiest] < changes[hardest]
        text = "easy problems compress more than hard ones"
        found.append(Claim("easy_first", text, held, figures))
    return found


def verdict(summary: Mapping[str, Any]) -> str:
    """The claims of the paper as lines of text: reproduced on this run, or not."""
    rows = [["claim of the paper", "on this run", "measured"]]
    for claim in claims(summary):
        rows.append([claim.text, "holds" if claim.held else "DOES NOT HOLD", claim.figures])
    return _align(rows)


def _levels(summary: Mapping[str, Any]) -> list[str]:
    """The named difficulty levels of a summary, easiest first."""
    return [level for level in sorted(summary["base"]["by_level"], key=_rank) if level]


def _rank(level: str) -> tuple[int, str]:
    """Sorts the tiny task's levels by difficulty and numbered ones by number."""
    tiny = ("easy", "medium", "hard")
    return (tiny.index(level), "") if level in tiny else (len(tiny), level)


def _half(statistics: Mapping[str, float], name: str) -> float:
    return _Z95 * statistics[f"{name}_se"]


def _align(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with columns of equal width."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def plot(
    folder: pathlib.Path,
    metrics: Sequence[Mapping[str, Any]],
    evaluations: Sequence[tuple[int, Mapping[str, Any]]],
    concise_prompt: Mapping[str, Any] | None,
    teacher_every: int,
) -> None:
    """Writes loss.png, length.png and entropy.png into a folder.

    Where there are evaluations also accuracy.png, and overview.png: length and accuracy together.

    Args:
      metrics: rows of metrics.jsonl.
      evaluations: (step, summary) of the student, step 0 being the base model.
      concise_prompt: summary of the base model under the instruction, drawn as a level.
      teacher_every: M; refreshes are marked.
    """
    import matplotlib  # slow to import, and needed once a run

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [row["step"] for row in metrics]
    refreshes = range(teacher_every, len(steps) + 1, teacher_every) if teacher_every else ()

    def curve(axes: Any, key: str, label: str) -> None:
        axes.plot(steps, [row[key] for row in metrics], label=label)

    def evaluated(axes: Any, key: str, scale: float) -> None:
        points = [(step, summary["overall"]) for step, summary in evaluations]
        axes.errorbar(
            [step for step, _ in points],
            [scale * overall[key] for _, overall in points],
            [scale * _half(overall, key) for _, overall in points],
            marker="o",
            capsize=3,
            label="student, plain prompt",
        )
        if concise_prompt is not None:
            level = scale * concise_prompt["overall"][key]
            label = SYSTEM_NAMES["concise_prompt"]
            axes.axhline(level, color="tab:green", linestyle="--", label=label)

    def loss(axes: Any) -> None:
        curve(axes, "loss", "loss")
        axes.set_title("divergence per response token (nats)")

    def entropy(axes: Any) -> None:
        curve(axes, "student_entropy", "student")
        curve(axes, "teacher_entropy", "teacher")
        axes.set_title("entropy per response token (nats)")

    def length(axes: Any) -> None:
        curve(axes, "response_tokens", "training rollouts")
        if evaluations:
            evaluated(axes, "tokens", 1.0)
        axes.set_title("mean response tokens")

    def accuracy(axes: Any) -> None:
        evaluated(axes, "accuracy", 100.0)
        axes.set_title("accuracy (%, 95% intervals)")

    def save(name: str, *panels: Callable[[Any], None]) -> None:
        figure, grid = pyplot.subplots(
            1, len(panels), figsize=(5.5 * len(panels), 3.4), layout="constrained", squeeze=False
        )
        for axes, panel in zip(grid[0], panels, strict=True):
            panel(axes)
            for step in refreshes:
                axes.axvline(step, color="0.8", linewidth=1, zorder=0)
            axes.set_xlabel("step (grey: teacher refreshed)")
            axes.set_ylim(bottom=0)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False)
        figure.savefig(folder / f"{name}.png", dpi=100)
        pyplot.close(figure)

    save("loss", loss)
    save("entropy", entropy)
    save("length", length)
    if evaluations:
        save("accuracy", accuracy)
        save("overview", length, accuracy)
