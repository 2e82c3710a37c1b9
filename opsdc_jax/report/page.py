"""report.html: one file that opens anywhere and loads nothing."""

import base64
import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from ml_collections import ConfigDict

import opsdc_jax
from opsdc_jax.config import flatten
from opsdc_jax.report import figures, pairs, text, tokens, words
from opsdc_jax.report.run import Run, read_run
from opsdc_jax.statistics import HEADLINE


def write(path: pathlib.Path) -> pathlib.Path:
    """Writes report.html and the figures in plots/ of a run, as far as the run got.

    Returns:
      The page.

    Raises:
      InputError: the folder holds no run, or a damaged file.
    """
    run = read_run(path)
    context = _context(run)
    templates = jinja2.PackageLoader("opsdc_jax.report")
    environment = jinja2.Environment(
        loader=templates, autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    environment.filters |= {"value": text.value, "interval": text.interval}

    def source(name: str) -> str:
        return templates.get_source(environment, name)[0]

    chart_style, script = source("chart.css"), source("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.get_template("page.html.jinja").render(
        **context,
        style=chart_style + source("page.css"),
        script=script,
        script_hash=f"sha256-{digest}",
        version=opsdc_jax.__version__,
    )
    _write_plots(path / "plots", context, chart_style)
    target = path / "report.html"
    temporary = target.with_suffix(".tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(target)
    return target


def _write_plots(folder: pathlib.Path, context: Mapping[str, Any], style: str) -> None:
    folder.mkdir(exist_ok=True)
    shown = [figure for benchmark in context["benchmarks"] for figure in benchmark["figures"]]
    shown += context["training"]
    shown += [figure for _, charts in context["lengths"] for figure in charts]
    for figure in shown:
        (folder / f"{figure.name}.svg").write_text(figure.chart.svg(style), encoding="utf-8")


def _context(run: Run) -> dict[str, Any]:
    """Everything the template shows."""
    steps, choices = tokens.select(run.views, run.refreshes)
    return {
        "name": run.path.resolve().name,
        "lead": text.lead(run),
        "notes": run.notes,
        "facts": text.facts(run),
        "benchmarks": [_benchmark(name, results) for name, results in run.benchmarks.items()],
        "training": figures.training(run),
        "training_note": text.training_note(run),
        "lengths": [(found.benchmark, figures.lengths(found)) for found in run.responses],
        "pairs": [(found.benchmark, pairs.select(found)) for found in run.responses],
        "token_steps": steps,
        "choices": choices,
        "heat_labels": tokens.heat_labels(),
        "words_note": text.words_note(run),
        "word_tables": words.tables(run.views),
        "config": list(flatten(ConfigDict(run.config)).items()),
    }


def _benchmark(name: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of the tables of one benchmark."""
    systems = results["systems"]
    against_base = {c["system"]: c for c in results["comparisons"] if c["against"] == "base"}
    rows = []
    for system, measured in systems.items():
        overall, compared = measured["overall"], against_base.get(system)
        rows.append(
            {
                "role": system,
                "label": text.SYSTEMS[system],
                "accuracy": overall["scores"][HEADLINE],
                "tokens": overall["tokens"]["mean"],
                "truncated": overall["truncated"],
                "gain": compared and compared["overall"]["scores"][HEADLINE],
                "reduction": compared and compared["overall"]["token_reduction"]["overall"],
            }
        )
    return {
        "name": name,
        "caption": text.benchmark_caption(name, results),
        "rows": rows,
        "levels": _groups("by_level", systems, against_base.get("student")),
        "pass_rates": _groups("by_base_pass_rate", systems, against_base.get("student")),
        "warnings": results["warnings"],
        "figures": figures.evaluation(name, results),
        "details": _details([measured["overall"] for measured in systems.values()]),
    }


def _groups(
    grouping: str, systems: Mapping[str, Any], student: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """Base against student, a row for each group of problems."""
    if student is None:
        return []
    rows = []
    for group, compared in student[grouping].items():
        base, after = (systems[name][grouping][group] for name in ("base", "student"))
        rows.append(
            {
                "label": group,
                "problems": compared["problems"],
                "base_accuracy": base["scores"][HEADLINE],
                "accuracy": after["scores"][HEADLINE],
                "gain": compared["scores"][HEADLINE],
                "base_tokens": base["tokens"]["mean"],
                "tokens": after["tokens"]["mean"],
                "reduction": compared["token_reduction"]["overall"],
            }
        )
    return rows


def _details(overall: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, list[Any]]]:
    """(label, scale, an estimate for each system) of all that the first table leaves out."""
    rows: list[tuple[str, float, list[Any]]] = []

    def add(label: str, scale: float, *keys: str) -> None:
        cells = []
        for statistics in overall:
            found: Any = statistics
            for key in keys:
                found = found[key]
            alone = isinstance(found, int | float)
            cells.append({"value": found, "low": None, "high": None} if alone else found)
        rows.append((label, scale, cells))

    for scorer in overall[0]["scores"]:
        add(f"accuracy by {scorer}, %", 100, "scores", scorer)
    for draws in overall[0]["pass_at"]:
        add(f"pass@{draws}, %", 100, "pass_at", draws)
    for kind in ("tokens", "thinking_tokens", "answer_tokens"):
        for statistic in ("mean", "median", "p90"):
            add(f"{kind.replace('_', ' ')}, {statistic}", 1, kind, statistic)
    for name in ("truncated", "repetitive", "unparsed", "timed_out"):
        add(f"{name.replace('_', ' ')}, %", 100, name)
    add("words of doubt per 1,000 tokens", 1, "doubt_per_1000")
    return rows
