"""Ablations: suites, rules on made-up results, and the command with a trainer that pretends."""

import json
import re
import signal
import sys

import pytest
from helpers import ROOT, load_config, load_script

from opsdc_jax import cli, config, processes
from opsdc_jax.ablation import measures, rules, runs, suites, text
from opsdc_jax.ablation.rules import NO_VERDICT, NOT_REPRODUCED, OPPOSITE, REPRODUCED
from opsdc_jax.config import InputError, flatten
from opsdc_jax.files import read_json_lines
from opsdc_jax.workdir import Workdir

ablate = load_script("ablate")
TINY = load_config("tiny")


def base(**changes):
    return suites.applied(TINY, ablate.FIXED | changes)


def variant(*values, measure="compression"):
    """Runs of a variant, one value of a measure a seed."""
    return {seed: {measure: value} for seed, value in enumerate(values)}


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((55, 56, 57), REPRODUCED),
        ((49, 56, 57), NOT_REPRODUCED),  # the mean is above the threshold, its interval is not
        ((20, 21, 22), NOT_REPRODUCED),
        ((-20, -21, -22), OPPOSITE),
        ((-20, -1, 15), NOT_REPRODUCED),
    ],
)
def test_a_value_against_a_threshold_and_its_contrary(values, verdict):
    quantity = rules.more("compression", "default", 50.0, contrary=0.0)
    assert rules.judge(quantity, {"default": variant(*values)}, 3).verdict == verdict


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((1, 0, -1), REPRODUCED),
        ((3, 0, -3), NOT_REPRODUCED),
        ((10, 11, 12), OPPOSITE),
        ((-10, -11, -12), OPPOSITE),
    ],
)
def test_a_band_has_its_contrary_on_both_sides(values, verdict):
    quantity = rules.within("compression", "a", -3.0, 3.0)
    assert rules.judge(quantity, {"a": variant(*values)}, 3).verdict == verdict


def test_a_collapse_is_the_opposite_only_where_accuracy_rises():
    quantity = rules.less("kept", "a", 50.0, contrary=100.0)
    for values, verdict in (
        ((0, 0, 0), REPRODUCED),
        ((80, 81, 82), NOT_REPRODUCED),
        ((110, 111, 112), OPPOSITE),
    ):
        found = rules.judge(quantity, {"a": variant(*values, measure="kept")}, 3)
        assert found.verdict == verdict


def test_differences_are_taken_within_the_seed():
    """Seeds that differ far more than the variants do hide nothing."""
    quantity = rules.more("compression", "a", minus=("compression", "b"))
    found = rules.judge(quantity, {"a": variant(11, 52, 93), "b": variant(10, 50, 90)}, 3)
    half = 4.3027 / 3**0.5  # the t quantile of two degrees of freedom
    assert list(found.estimate.values()) == pytest.approx([2, 2 - half, 2 + half], abs=1e-4)
    assert found.verdict == NOT_REPRODUCED
    found = rules.judge(quantity, {"a": variant(12, 52, 92.1), "b": variant(10, 50, 90)}, 3)
    assert found.verdict == REPRODUCED


@pytest.mark.parametrize(
    ("found", "seeds", "reason"),
    [
        ({"a": variant(60)}, 1, "one seed"),
        ({"a": variant(60, 61)}, 3, "runs are missing"),
        ({}, 3, "runs are missing"),
        ({"a": variant(1, 2, 3, measure="tokens")}, 3, "there is no such measure"),
    ],
)
def test_without_all_numbers_there_is_no_verdict(found, seeds, reason):
    judged = rules.judge(rules.more("compression", "a"), found, seeds)
    assert (judged.verdict, judged.reason) == (NO_VERDICT, reason)
    sentence = text.sentence(rules.CLAIMS[0], rules.together([judged]), [judged])
    assert sentence.startswith(f"- **no verdict** ({reason}): Responses lose at least half")


@pytest.mark.parametrize(
    ("parts", "verdict"),
    [
        ((REPRODUCED, REPRODUCED), REPRODUCED),
        ((REPRODUCED, OPPOSITE), NOT_REPRODUCED),
        ((OPPOSITE, OPPOSITE), OPPOSITE),
        ((REPRODUCED, NO_VERDICT), NO_VERDICT),
    ],
)
def test_a_claim_needs_all_its_quantities(parts, verdict):
    quantity = rules.more("compression", "a")
    judged = [rules.Judged(quantity, None, part) for part in parts]
    assert rules.together(judged) == verdict


def test_claims_are_about_variants_and_measures_that_there_are():
    known = suites.suites(base())
    for claim in rules.CLAIMS:
        variants = {variant.name for variant in known[claim.suite].variants}
        for quantity in claim.quantities:
            sides = [(quantity.measure, quantity.variant)]
            sides += [quantity.minus] if quantity.minus else []
            assert {measure for measure, _ in sides} <= set(measures.LABELS)
            assert {name for _, name in sides} <= variants
            assert quantity.below <= quantity.lower < quantity.upper <= quantity.above


@pytest.mark.parametrize("name", ["tiny", "qwen3_8b"])
def test_overrides_are_of_keys_that_there_are(name):
    settings = load_config(name)
    for suite in suites.chosen(",".join(suites.suites(settings)), settings).values():
        assert len({variant.name for variant in suite.variants}) == len(suite.variants)
        for variant in suite.variants:
            config.validate(suites.applied(settings, variant.overrides))


@pytest.mark.parametrize(
    ("variant", "name"), [("SFT", "tiny_sft"), ("policy gradient", "tiny_policy_gradient")]
)
def test_baselines_are_those_of_the_configs(variant, name):
    (found,) = [v for v in suites.suites(TINY)["baselines"].variants if v.name == variant]
    ours, theirs = (
        flatten(suites.applied(settings, ablate.FIXED))
        for settings in (suites.applied(TINY, found.overrides), load_config(name))
    )
    assert ours == theirs


def test_values_follow_the_configuration():
    found = {
        name: [dict(v.overrides) for v in suites.suites(load_config(name))["teacher"].variants[:5]]
        for name in ("tiny", "qwen3_8b")
    }
    assert [v["teacher.every"] for v in found["tiny"]] == [1, 4, 10, 20, 0]
    assert [v["teacher.every"] for v in found["qwen3_8b"]] == [1, 10, 25, 50, 0]


def test_equal_variants_are_one_run(tmp_path):
    settings = base()
    known = suites.suites(settings)
    variants = [
        v.overrides for name in ("rollout", "method", "divergence") for v in known[name].variants
    ]
    found = runs.planned(settings, variants, 2, tmp_path)
    names = [run.name for run in found]
    assert names[:2] == ["default", "default"]  # first: the others take over its evaluations
    assert len(found) == len({run.folder for run in found}) == 2 * (1 + 2 + 4)
    assert names.count("default") == 2
    assert [run.seed for run in found[:2]] == [0, 1]
    assert "loss.divergence=jsd" in names
    assert not any(tmp_path.iterdir())


def test_an_unknown_suite_and_an_unknown_key_are_refused():
    with pytest.raises(InputError, match="--suite=divergances is not one of method, divergence,"):
        suites.chosen("divergances", base())
    with pytest.raises(InputError, match=r"unknown key config.teacher.evry: did you mean"):
        suites.run_name(base(), {"teacher.evry": 1})


def test_a_run_of_another_configuration_is_refused(tmp_path):
    Workdir(tmp_path / "default-seed0", base(**{"train.steps": 7})).create()
    with pytest.raises(InputError, match=r"default-seed0 holds a run of another .*train.steps: 7"):
        runs.planned(base(), [{}], 1, tmp_path)


def test_train_gets_the_settings_of_the_variant(tmp_path):
    settings = base(**{"train.steps": 7})
    overrides = {"teacher.every": 0, "optim.lr": 5e-05, "prompts.instruction": "none"}
    (run,) = runs.planned(settings, [overrides], 1, tmp_path)
    argv = ["train.py", "--config", str(ROOT / "configs" / "tiny.py"), *run.arguments(TINY)]
    values = cli.config_flag_values(argv[:-2])
    assert flatten(cli.parse(values, argv[:-2]).config) == flatten(run.settings)
    assert argv[-2:] == ["--workdir", str(run.folder)]
    assert not any("eval.reuse" in argument for argument in argv)
    (tmp_path / "default-seed0" / "eval").mkdir(parents=True)
    assert f"--config.eval.reuse={tmp_path / 'default-seed0'}" in run.arguments(TINY)


def test_responses_of_the_base_are_taken_over_from_a_run_of_the_same_seed(tmp_path):
    variants = [{"loss.divergence": "jsd"}, {"teacher.every": 0}]
    jsd, _, frozen, _ = runs.planned(base(), variants, 2, tmp_path)
    for name in ("loss.divergence=jsd-seed1", "teacher.every=0-seed0", "teacher.every=0-seed10"):
        (tmp_path / name / "eval").mkdir(parents=True)
    assert f"--config.eval.reuse={frozen.folder}" in jsd.arguments(TINY)
    assert not any("eval.reuse" in argument for argument in frozen.arguments(TINY))


# Pretends to train: writes what a finished run holds. One run of the seed 1 fails if it is told to.
TRAINER = """
import json, pathlib, sys
here, folder = pathlib.Path(__file__).parent, pathlib.Path(sys.argv[-1])
with (here / "started").open("a") as file:
    file.write(folder.name + "\\n")
if (here / "fail").exists() and folder.name == "loss.divergence=jsd-seed1":
    sys.exit(4)
seed = int(folder.name[-1])
tokens = 39.0 if "forward" in folder.name else 30.0

def figures(accuracy, tokens):
    return {
        "scores": {"committed": {"value": accuracy}},
        "tokens": {"mean": {"value": tokens}},
        "truncated": {"value": 0.25},
    }

def system(accuracy, tokens):
    levels = {
        level: figures(accuracy - rank / 10, tokens + 10 * rank)
        for rank, level in enumerate(("easy", "medium", "hard"))
    }
    return {"overall": figures(accuracy, tokens), "by_level": levels}

systems = {
    "base": system(0.75, 80.0),
    "concise_prompt": system(0.80, 60.0),
    "student": system(0.77 + seed / 100, tokens + seed),
}
benchmark = {"settings": {}, "systems": systems, "comparisons": [], "curve": [], "warnings": []}
(folder / "eval").mkdir(parents=True)
rows = [{"step": step, "student_entropy": 0.5 - 0.01 * step} for step in range(1, 11)]
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
configs = json.loads((here / "configs.json").read_text())
(folder / "config.json").write_text(configs[folder.name])
(folder / "eval" / "summary.json").write_text(json.dumps({"benchmarks": {"tiny": benchmark}}))
print("trained", *sys.argv[1:])
"""


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """Calls scripts/ablate.py with the pretending trainer; gives its exit code."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "train.py").write_text(TRAINER)
    planned = runs.planned

    def planned_and_told(*given):
        found = planned(*given)
        configs = {run.folder.name: run.settings.to_json() for run in found}
        (scripts / "configs.json").write_text(json.dumps(configs))
        return found

    monkeypatch.setattr(runs, "planned", planned_and_told)
    monkeypatch.setattr(ablate, "ROOT", tmp_path)
    out = ["--out", str(tmp_path / "out")]
    return lambda *arguments: cli.run(ablate.main, ["ablate.py", *arguments, *out])


def started(tmp_path):
    return (tmp_path / "scripts" / "started").read_text().split()


def test_a_suite_from_the_command_to_its_table(pretend, tmp_path, capsys):
    document = tmp_path / "doc.md"
    blocks = "<!-- rules -->\n<!-- end of rules -->\n<!-- divergence -->\nold\n"
    document.write_text(f"before\n{blocks}<!-- end of divergence -->\nafter\n")
    code = pretend("--suite", "divergence", "--seeds=2", "--jobs=2", "--doc", str(document))
    printed = capsys.readouterr().out
    assert code == cli.EXIT_DONE
    assert printed.startswith("6 runs, of which 6 are to be made\n[1/6] default-seed")
    assert len(started(tmp_path)) == 6
    folder = tmp_path / "out" / "divergence"
    table = (folder / "table.md").read_text()
    assert table in printed + "\n"
    assert re.search(r"\| forward KL +\| `loss.divergence=forward_kl` +\| 77.5 ± 6.4 ", table)
    assert re.search(r"\| base +\| +\| 75.0 +\| 80.0 ", table)
    assert "`python scripts/ablate.py --suite divergence --seeds 2`" in table
    assert "- **not reproduced**: Forward KL collapses." in table
    assert (folder / "plot.svg").read_text().lstrip().startswith("<?xml")
    results = json.loads((folder / "results.json").read_text())
    jsd = results["variants"]["JSD"]
    assert jsd["runs"] == "loss.divergence=jsd"
    assert jsd["seeds"]["1"]["compression"] == pytest.approx(100 * (1 - 31 / 80))
    assert jsd["seeds"]["1"]["compression_hardest"] == pytest.approx(100 * (1 - 51 / 100))
    assert jsd["seeds"]["1"]["entropy"] == pytest.approx(100 * 0.42 / 0.47)
    assert jsd["seeds"]["1"]["seconds"] > 0
    assert jsd["over_seeds"]["tokens"]["value"] == 30.5
    assert [claim["verdict"] for claim in results["claims"]] == ["not reproduced"] * 2
    assert text.rules() in document.read_text()
    assert table.strip() in document.read_text()
    assert document.read_text().startswith("before\n<!-- rules -->")
    assert document.read_text().endswith("<!-- end of divergence -->\nafter\n")

    log = (tmp_path / "out" / "runs" / "loss.divergence=jsd-seed1.log").read_text()
    assert log.startswith(f"$ {sys.executable} ")
    assert "trained --config" in log
    assert "--config.seed=1" in log

    # Once more: nothing is run again, and the table is the same.
    assert pretend("--suite", "divergence", "--seeds=2") == cli.EXIT_DONE
    assert "6 runs, of which 0 are to be made" in capsys.readouterr().out
    assert len(started(tmp_path)) == 6
    assert (folder / "table.md").read_text() == table


def test_after_a_failed_run_the_others_go_on(pretend, tmp_path, capsys):
    fails = tmp_path / "scripts" / "fail"
    fails.touch()
    assert pretend("--suite", "divergence,method", "--seeds=2") == cli.EXIT_FAILED
    out, err = capsys.readouterr()
    assert "loss.divergence=jsd-seed1 ended with exit code 4: see" in err
    assert "- **no verdict** (runs are missing): JSD compresses" in out
    assert "- **not reproduced**: Forward KL collapses." in out
    assert "method: Does the method" in out
    fails.unlink()
    assert pretend("--suite", "divergence,method", "--seeds=2") == cli.EXIT_DONE
    assert started(tmp_path)[-2:] == ["loss.divergence=jsd-seed1"] * 2
    assert len(started(tmp_path)) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--suite is required"),
        (["--suite=x"], "--suite=x is not one of"),
        (["--suite=method", "--config.eval.source=none"], "must be one benchmark"),
        (["--suite=method", "--config.eval.source=math500,aime24"], "must be one benchmark"),
        (["--suite=method", "--seeds=0"], "seeds"),
        (["--suite=method", "--doc=nowhere.md"], "--doc=nowhere.md cannot be filled in"),
        (["--suite=teacher", "--config.teacher.every=0"], "'M = 1' and 'M / 5' are one run"),
        (["--suite=method", "--config.train.steps=0"], "train.steps=0 must be positive"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(pretend, tmp_path, capsys, arguments, message):
    assert pretend(*arguments) == cli.EXIT_BAD_INPUT
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "scripts" / "started").exists()


def test_a_document_without_a_suites_block_is_refused_before_anything_runs(
    pretend, tmp_path, capsys
):
    document = tmp_path / "doc.md"
    document.write_text("<!-- rules -->\n<!-- end of rules -->\n<!-- lr -->\n<!-- end of lr -->\n")
    before = document.read_text()
    assert pretend("--suite=lr,method", "--doc", str(document)) == cli.EXIT_BAD_INPUT
    assert "the document holds 0 blocks 'method'" in capsys.readouterr().err
    assert document.read_text() == before
    assert not (tmp_path / "scripts" / "started").exists()


def test_what_is_no_number_is_left_out(pretend, tmp_path, capsys):
    """A base that solves nothing has no share to keep, a step without entropy no course of it."""
    assert pretend("--suite=method", "--seeds=2") == cli.EXIT_DONE
    for folder in (tmp_path / "out" / "runs").glob("default-seed?"):
        summary = json.loads((folder / "eval" / "summary.json").read_text())
        base_scores = summary["benchmarks"]["tiny"]["systems"]["base"]["overall"]["scores"]
        base_scores["committed"]["value"] = 0.0
        (folder / "eval" / "summary.json").write_text(json.dumps(summary))
        metrics = (folder / "metrics.jsonl").read_text().replace("0.49", "null")
        (folder / "metrics.jsonl").write_text(metrics)
    capsys.readouterr()
    assert pretend("--suite=method", "--seeds=2") == cli.EXIT_DONE
    results = json.loads(
        (tmp_path / "out" / "method" / "results.json").read_text(), parse_constant=pytest.fail
    )
    (found, _) = results["variants"]["default"]["seeds"].values()
    assert "accuracy" in found
    assert not {"kept", "entropy"} & set(found)
    assert "(there is no such measure): The student's entropy" in capsys.readouterr().out


def test_the_command_that_is_told_names_configuration_and_overrides(pretend, capsys):
    path = str(ROOT / "configs" / "tiny_hard.py")
    arguments = ["--config", path, "--config.train.steps", "20", "--suite", "method"]
    assert pretend(*arguments, "--seeds=2") == cli.EXIT_DONE
    told = f"`python scripts/ablate.py --config {path} --config.train.steps=20 --suite method"
    assert told in capsys.readouterr().out


def test_left_early_the_runs_under_way_are_stopped(tmp_path, monkeypatch):
    began, start = [], processes.start

    def noted(*given):
        began.append(start(*given))
        return began[-1]

    monkeypatch.setattr(processes, "start", noted)
    found = runs.planned(base(), [{}], 2, tmp_path)
    script = "import sys, time; time.sleep(60 * ('seed1' in sys.argv[-1]))"
    train = [sys.executable, "-c", script]
    made = runs.run_all(found, train, TINY, 2, tmp_path / "runs.jsonl")
    run, code, _ = next(made)
    assert (run.seed, code) == (0, 0)
    made.close()
    assert [process.poll() for process in began] == [0, -signal.SIGTERM]
    recorded = read_json_lines(tmp_path / "runs.jsonl")
    assert [row["exit_code"] for row in recorded] == [0, -signal.SIGTERM]


def test_processors_are_shared_evenly(monkeypatch):
    monkeypatch.setattr(processes.os, "sched_getaffinity", lambda _: {3, 5, 6, 7, 9})
    assert processes.shares(1) == [{3, 5, 6, 7, 9}]
    assert processes.shares(2) == [{3, 5}, {6, 7}]
    monkeypatch.setattr(processes.os, "sched_getaffinity", lambda _: {4})
    assert processes.shares(2) == [{4}, {4}]
    monkeypatch.setattr(processes, "_CAN_CHOOSE", False)
    assert processes.shares(2) == [None, None]
    assert processes.cores() >= 1


def test_the_document_holds_these_rules():
    """Written before the results, by the program: `--doc` puts them there."""
    document = (ROOT / "docs" / "reproduction.md").read_text()
    assert text.replace_block(document, "rules", text.rules()) == document
    for name, suite in suites.suites(TINY).items():
        assert f"<!-- {name} -->" in document, suite.question
