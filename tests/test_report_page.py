"""report.html: what stands in it, from whole and from unfinished runs; its tokens, words, pairs."""

import html.parser
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree

import pytest
from helpers import load_script
from report_run import HOSTILE, make_run, rollout

from opsdc_jax import cli, report
from opsdc_jax.config import InputError
from opsdc_jax.files import read_json
from opsdc_jax.report import pairs, svg, text, tokens, words
from opsdc_jax.report.run import View, read_run


class Page(html.parser.HTMLParser):
    """Tags with attributes, the text of each kind of element, and ids."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.texts, self._open = [], {}, []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "path", "circle", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, "every element is closed, innermost first"

    def handle_data(self, data):
        for tag in self._open:
            self.texts.setdefault(tag, []).append(data)

    def text(self, tag="body"):
        return " ".join("".join(self.texts.get(tag, [])).split())

    def ids(self):
        return [attributes["id"] for _, attributes in self.tags if "id" in attributes]


def page_of(path):
    return Page(report.write(path).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "made-up-run")


@pytest.fixture(scope="module")
def page(run):
    return page_of(run)


def test_the_page_is_whole_and_loads_nothing(run, page):
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action"):
            value = attributes.get(name, "")
            assert value.startswith(("#", "data:,")) or not value, f"{tag} {name}={value}"
    source = (run / "report.html").read_text()
    assert "url(" not in source
    assert "@import" not in source
    assert "default-src 'none'" in source
    assert len(source.encode()) < 1_000_000


def test_every_part_is_there_and_named_once(page):
    ids = page.ids()
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for tag, a in page.tags if tag == "a"}
    assert targets == {"main", "results", "training", "lengths", "answers", "tokens", "words",
                       "settings"}  # fmt: skip
    assert targets <= set(ids)
    named = [a["aria-labelledby"] for tag, a in page.tags if tag == "section"]
    assert set(named) <= set(ids)


def test_the_lead_and_the_table_say_what_the_summary_says(run, page):
    results = read_json(run / "eval" / "summary.json")["benchmarks"]["made-up"]
    base, student = (results["systems"][name]["overall"] for name in ("base", "student"))
    compared = next(
        c["overall"]
        for c in results["comparisons"]
        if (c["system"], c["against"]) == ("student", "base")
    )
    reduction = compared["token_reduction"]["overall"]
    lead = page.text("header")
    assert "After 4 steps the student" in lead
    for system in (base, student):
        assert f"{system['tokens']['mean']['value']:,.1f}" in lead
        assert f"{100 * system['scores']['committed']['value']:.1f}%" in lead
    assert f"{100 * reduction['value']:.1f}% fewer" in lead
    ends = f"{100 * reduction['low']:.1f} to {100 * reduction['high']:.1f}"
    assert f"({ends})" in lead
    table = page.text("table")
    assert ends in table
    assert "concise prompt" in table
    assert all(level in table for level in ("easy", "hard"))


def test_every_figure_is_also_a_file(run, page):
    drawn = [attributes for tag, attributes in page.tags if tag == "svg"]
    files = sorted((run / "plots").iterdir())
    assert len(drawn) == len(files) == 11
    for file in files:
        root = ElementTree.parse(file).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "prefers-color-scheme" in file.read_text()
        assert "nan" not in file.read_text()
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in drawn)


def test_what_a_model_wrote_stays_text(run, page):
    source = (run / "report.html").read_text()
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert [s.get("type") for s in scripts] == ["application/json", None]
    assert not [tag for tag, _ in page.tags if tag == "b" and "hacked" in tag]
    assert "hacked" in page.text()
    assert "<b>bold" not in source
    data = re.search(r'<script type="application/json" id="choices">(.*?)</script>', source)[1]
    assert json.loads(data)[0][8][0] == HOSTILE


def test_the_data_and_the_tokens_match(page):
    source = page.texts["script"][0]
    groups = [a for tag, a in page.tags if "tokens model" in a.get("class", "")]
    choices = json.loads(source)
    assert [int(group["data-rollout"]) for group in groups] == list(range(len(choices)))
    assert {len(rollout) for rollout in choices} == {12}


def test_an_unfinished_run_shows_what_there_is(tmp_path):
    path = make_run(tmp_path / "run", done=3, finished=False, evaluated=("base",), views=(1,))
    page = page_of(path)
    assert "has not finished: 3 of 4 steps" in page.text("header")
    assert "from 160.0 to" in page.text("header")
    assert "accuracy is compared at the end" in page.text("header")
    assert not {"lengths", "answers"} & set(page.ids())
    assert {"results", "training", "tokens", "words"} <= set(page.ids())


def test_results_do_not_wait_for_the_end(tmp_path):
    evaluated = ("base", "student-000002")
    path = make_run(tmp_path / "run", done=3, finished=False, evaluated=evaluated)
    page = page_of(path)
    assert {"results", "lengths", "answers"} <= set(page.ids())
    assert "After 2 steps the student" in page.text("header")
    # The next evaluation has begun: results of other systems wait until it is complete.
    folder = path / "eval" / "made-up"
    shutil.copy(folder / "base.settings.json", folder / "student-000004.settings.json")
    page = page_of(path)
    assert "results" not in page.ids()
    assert {"lengths", "answers"} <= set(page.ids())


def test_one_step_without_evaluation_and_views(tmp_path):
    path = make_run(tmp_path / "run", steps=1, evaluated=(), views=())
    page = page_of(path)
    assert "Over 1 step the training rollouts" in page.text("header")
    assert "Nothing was evaluated" in page.text("header")
    assert "log.token_views is 0" in page.text("header")
    assert "script" not in page.texts
    for file in (path / "plots").iterdir():
        ElementTree.parse(file)


def test_before_the_first_step(tmp_path):
    page = page_of(make_run(tmp_path / "run", done=0, evaluated=(), finished=False, views=()))
    assert "0 of 4 steps" in page.text("header")


@pytest.mark.parametrize(
    ("every", "says"),
    [
        (0, "The teacher is frozen"),
        (9, "has not been refreshed yet"),
        (2, "every 2 steps: the dotted lines"),
    ],
)
def test_the_teacher_is_told(tmp_path, every, says):
    path = make_run(tmp_path / "run", evaluated=(), teacher_every=every)
    page = page_of(path)
    assert says in page.text("main")
    rules = (path / "plots" / "loss.svg").read_text().count('class="rule"')
    assert rules == (1 if every == 2 else 0)


def test_an_evaluation_without_training_has_a_page_too(tmp_path):
    path = make_run(tmp_path / "run", evaluated=("base", "student"), views=())
    for name in ("config.json", "metrics.jsonl"):
        (path / name).unlink()
    page = page_of(path)
    assert "Here the student answers" in page.text("header")
    assert not {"training", "settings", "tokens"} & set(page.ids())


def test_an_evaluation_of_an_older_version_is_told(tmp_path):
    path = make_run(tmp_path / "run", evaluated=())
    (path / "eval" / "summary.json").write_text('{"base": {}}')
    assert "older version" in page_of(path).text("header")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: shutil.rmtree(path), "holds no run"),
        (lambda path: (path / "config.json").write_text("{"), "config.json cannot be read"),
        (
            lambda path: (path / "samples" / "tokens-000001.jsonl").write_text("[1]"),
            "tokens-000001.jsonl:1 does not hold a JSON object",
        ),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, damage, message, capsys):
    path = make_run(tmp_path / "run", evaluated=())
    damage(path)
    script = load_script("report")
    assert cli.run(script.main, ["report.py", "--workdir", str(path)]) == cli.EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    with pytest.raises(InputError):
        report.write(path)


def test_the_script_says_what_it_wrote(run, capsys):
    script = load_script("report")
    assert cli.run(script.main, ["report.py", "--workdir", str(run)]) == cli.EXIT_DONE
    assert f"wrote {run / 'report.html'}" in capsys.readouterr().out
    assert cli.run(script.main, ["report.py"]) == cli.EXIT_BAD_INPUT


def results(reduction, gain):
    """The part of a benchmark's summary that the lead needs."""

    def estimate(value, half=0.02):
        return {"value": value, "low": value - half, "high": value + half}

    def system(accuracy, mean):
        return {
            "overall": {
                "scores": {"committed": estimate(accuracy)},
                "tokens": {"mean": estimate(mean)},
            }
        }

    compared = {
        "problems": 500,
        "scores": {"committed": estimate(gain)},
        "token_reduction": {"overall": estimate(reduction)},
    }
    return {
        "systems": {"base": system(0.8, 100), "student": system(0.8 + gain, 100 * (1 - reduction))},
        "comparisons": [{"system": "student", "against": "base", "overall": compared}],
        "curve": [{"step": 0}, {"step": 100}],
    }


@pytest.mark.parametrize(
    ("reduction", "gain", "says"),
    [
        (0.5, 0.05, "50.0% fewer (48.0 to 52.0). Its accuracy is 85.0% against 80.0%: 5.0 points "
                    "higher (3.0 to 7.0)."),
        (0.5, -0.05, "5.0 points lower (−7.0 to −3.0)."),
        (0.5, 0.01, "1.0 points higher, which these 500 problems cannot tell from none"),
        (-0.25, 0.0, "25.0% more (23.0 to 27.0)."),
    ],
)  # fmt: skip
def test_the_lead_tells_better_from_worse(tmp_path, reduction, gain, says):
    run = read_run(make_run(tmp_path / "run", evaluated=()))
    run = run._replace(benchmarks={"made-up": results(reduction, gain)})
    (sentence,) = text.lead(run)
    assert says in "".join(piece for piece, _ in sentence)


def test_pairs_are_the_medians_of_their_levels_and_one_loss(run):
    (found,) = read_run(run).responses
    assert found.student.system == "student-000004"
    grades = [
        {row["index"]: row for row in files.read_grades() if row["sample"] == 0}
        for files in (found.base, found.student)
    ]
    reductions = {i: 1 - grades[1][i]["tokens"] / row["tokens"] for i, row in grades[0].items()}
    easy, hard, lost = pairs.select(found)
    for pair, level in ((easy, "Easy"), (hard, "Hard")):
        index = int(pair.gold)
        group = sorted(r for i, r in reductions.items() if grades[0][i]["level"] == level.lower())
        assert reductions[index] == group[(len(group) - 1) // 2]
        assert pair.title == f"{level}, the median: {reductions[index]:.0%} fewer tokens"
        assert pair.base.tokens == grades[0][index]["tokens"]
        assert f"base {index}" in pair.base.text
        assert f"student-000004 {index}" in pair.student.text
    assert lost.title.startswith("Solved by the base only, one of ")
    assert (lost.base.correct, lost.student.correct) == (True, False)


def test_long_responses_are_shown_from_both_ends():
    grade = {"tokens": 9, "scores": {"committed": True}, "truncated": False}
    shown = pairs._answer({"text": "a" * 5000 + "z" * 5000}, grade).text
    assert shown.startswith("a" * 3000 + "\n\n[5,500 characters left out]")
    assert shown.endswith("z" * 1500)


def test_words_join_tokens_and_numbers():
    parts = list(words.split(["<think>", " super", "fluous", ",", "\n", " 3", "3", ".", " é"]))
    assert parts == [
        ("<think>", range(0, 1)),
        ("superfluous", range(1, 3)),
        (",", range(3, 4)),
        ("33", range(5, 7)),
        (".", range(7, 8)),
        ("é", range(8, 9)),
    ]
    ranked = words.rank([rollout(0, "x"), rollout(1, "x")])
    assert ranked[0].text == "x"
    by_name = {word.text: word for word in ranked}
    joined = by_name["superfluous"]
    assert (joined.times, joined.mean) == (2, pytest.approx(0.4))
    assert joined.student_prob == pytest.approx(0.25), "of both its tokens"
    numbers = by_name[words.NUMBER]
    assert (numbers.times, numbers.total) == (4, pytest.approx(0.5))
    assert sum(word.share for word in ranked) == pytest.approx(1.0)


def test_long_rollouts_are_cut_and_say_so():
    long = {
        key: value * 200 if isinstance(value, list) else value
        for key, value in rollout(1, "x").items()
    }
    steps, choices = tokens.select([View(1, [long])], refreshes=[])
    (shown,) = steps[0].rollouts
    assert len(shown.tokens) == len(choices[0]) == tokens.TOKENS
    assert shown.note == "2,400 tokens, of which the first 1,200 are shown, cut by the budget"


def test_steps_shown_are_the_first_the_middle_and_the_last():
    views = [View(step, []) for step in (1, 10, 20, 30, 40)]
    steps, _ = tokens.select(views, refreshes=[20, 40])
    assert [step.title for step in steps] == ["Step 1", "Step 20", "Step 40"]
    assert steps[0].about.startswith("The base model itself; the teacher is the base model")
    assert "after 19 updates; the teacher is the base model" in steps[1].about
    assert "after 39 updates; the teacher is the student of step 20" in steps[2].about


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (0.7, 0.86, [0.7, 0.75, 0.8, 0.85, 0.9]),
        (5, 5, [2, 3, 4, 5, 6, 7, 8]),
        (0, 0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 1.2e-5, [0, 2.5e-6, 5e-6, 7.5e-6, 1e-5, 1.25e-5]),
    ],
)
def test_ticks_are_round_and_enclose(low, high, expected):
    assert svg.ticks(low, high, 5) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (0.30000000000000004, "0.3"), (-5, "−5"), (30000, "30,000"), (2.5e-6, "2.5e-6")],
)
def test_numbers_are_short(value, expected):
    assert svg.number(value) == expected


def test_a_gap_in_a_curve_stays_a_gap():
    chart = svg.Chart("gap", "step", x=(0, 3), y=(0, 1))
    chart.line("student", [(0, 0.5), (1, float("nan")), (2, 0.5), (3, 0.5)])
    path = re.search(r'class="line student" d="([^"]*)"', chart.svg())[1]
    assert path.count("M") == 2
    assert "nan" not in path
