"""Tables that lie: what is refused as a whole, and what is left out and counted."""

import json
import os
import pathlib

import pytest
from bad_inputs import Case, Sandbox, assert_refused, fifo, script, table

from opsdc_jax import cli, data
from opsdc_jax.config import InputError
from opsdc_jax.files import LONGEST_LINE

ROWS = [{"problem": f"start {n}", "answer": n} for n in range(4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def parquet(sandbox, change=lambda content: content):
    import pyarrow as pa
    import pyarrow.parquet

    path = sandbox.path / "a.parquet"
    pa.parquet.write_table(pa.Table.from_pylist(ROWS), path)
    path.write_bytes(change(path.read_bytes()))
    return sandbox.train(f"--config.data.source={path}")


def long_line(sandbox):
    """100 MB without the end of a line, of which the disk holds nothing."""
    path = sandbox.file("a.jsonl", '{"problem": "')
    os.truncate(path, 100_000_000)
    return sandbox.train(f"--config.data.source={path}")


def link(sandbox, name, target):
    (sandbox.path / name).symlink_to(target)
    return sandbox.train(f"--config.data.source={sandbox.path / name}")


def folder(sandbox, name):
    (sandbox.path / name).mkdir()
    return sandbox.train(f"--config.data.source={sandbox.path / name}")


def pipe(sandbox):
    return sandbox.train(f"--config.data.source={fifo(sandbox.path / 'a.jsonl')}")


FILES: list[Case] = [
    ("empty", lambda s: s.data("a.jsonl", b""), "a.jsonl' has no rows: give a table that holds"),
    ("blank lines", lambda s: s.data("a.jsonl", b"\n \n\n"), "has no rows"),
    ("binary", lambda s: s.data("a.jsonl", bytes(range(256))), "a.jsonl:1.*(JSON|UTF-8)"),
    ("compressed", lambda s: s.data("a.jsonl", b"\x1f\x8b\x08\x00"), "a.jsonl:1 is not UTF-8"),
    ("UTF-16", lambda s: s.data("a.jsonl", LINES.encode("utf-16")), "a.jsonl:1 is not UTF-8"),
    (
        "bad UTF-8 later",
        lambda s: s.data("a.jsonl", LINES.encode() + b'"\xff"'),
        "a.jsonl:5 is not",
    ),
    ("a torn line", lambda s: s.data("a.jsonl", LINES + '{"prob'), "a.jsonl:5 holds broken JSON"),
    (
        "no JSON",
        lambda s: s.data("a.jsonl", "problem,answer\n1,2\n"),
        "a.jsonl:1 holds broken JSON",
    ),
    ("deep JSON", lambda s: s.data("a.jsonl", "[" * 10**5), "a.jsonl:1 holds JSON that cannot"),
    ("a huge number", lambda s: s.data("a.jsonl", "9" * 10**5), "a.jsonl:1 holds JSON that cannot"),
    ("100 MB in a line", long_line, "a.jsonl:1 is longer than 16 MiB"),
    ("no such file", lambda s: s.train("--config.data.source=none.jsonl"), "there is no such file"),
    ("no match", lambda s: s.train("--config.data.source=no*.jsonl"), "matches no file"),
    ("a folder", lambda s: folder(s, "rows"), "is a folder: give a glob of its files"),
    ("a folder by the name of a file", lambda s: folder(s, "a.jsonl"), "is a folder"),
    (
        "below a file",
        lambda s: s.train(f"--config.data.source={s.file('f', '')}/a.jsonl"),
        "no such",
    ),
    ("a pipe", pipe, "a.jsonl cannot be read: it is a pipe or a device"),
    ("a device", lambda s: link(s, "a.jsonl", "/dev/zero"), "a.jsonl cannot be read: it is a pipe"),
    ("a link to nothing", lambda s: link(s, "a.jsonl", "nowhere"), "there is no such file"),
    ("a link to itself", lambda s: link(s, "a.jsonl", "a.jsonl"), "there is no such file"),
    ("another format", lambda s: s.data("a.csv", LINES), "ends in none of .jsonl, .json, .parquet"),
    ("a script", lambda s: s.data("a.py", "import os"), "ends in none of .jsonl, .json, .parquet"),
    (
        "a pickle",
        lambda s: s.data("a.pkl", b"\x80\x04N."),
        "ends in none of .jsonl, .json, .parquet",
    ),
    (
        "split of a file",
        lambda s: [*s.data("a.jsonl", ROWS), "--config.data.split=test"],
        "data.split",
    ),
    (
        "broken array",
        lambda s: s.data("a.json", '[{"problem": "x"},\n {]'),
        "a.json:2 holds broken",
    ),
    ("empty array", lambda s: s.data("a.json", "[]"), "has no rows"),
    ("array of numbers", lambda s: s.data("a.json", "[1, 2]"), "a.json:1: is of type int, not an"),
    ("one object", lambda s: s.data("a.json", '{\n"data": []\n}'), "one array of objects"),
    ("parquet that is none", lambda s: s.data("a.parquet", LINES), "a.parquet is no parquet"),
    ("empty parquet", lambda s: s.data("a.parquet", b""), "a.parquet is no parquet"),
    ("half a parquet", lambda s: parquet(s, lambda b: b[: len(b) // 2]), "a.parquet is no parquet"),
    ("parquet without its head", lambda s: parquet(s, lambda b: b[20:]), "a.parquet is no parquet"),
    ("no such set", lambda s: s.train("--config.data.source=tinny"), "data.source='tinny' is not"),
    ("tfds of nothing", lambda s: s.train("--config.data.source=tfds:"), "data.source='tfds:'"),
]
ROWS_THAT_LIE: list[Case] = [
    (
        "no such column",
        lambda s: s.data("a.jsonl", [{"text": "x"}]),
        "no column problem or question",
    ),
    (
        "no answers for a gate",
        lambda s: [*s.data("a.jsonl", [{"problem": "x"}]), "--config.loss.only_correct=True"],
        "a.jsonl:1: has no answer to grade with.*data.answer_column",
    ),
    (
        "a column named wrongly",
        lambda s: [*s.data("a.jsonl", ROWS), "--config.data.problem_column=text"],
        "no column text, only problem, answer.*data.problem_column",
    ),
    ("nulls", lambda s: s.data("a.jsonl", [{"problem": None}]), "a.jsonl:1: problem is null"),
    (
        "numbers",
        lambda s: s.data("a.jsonl", [{"problem": 7}]),
        "problem is of type int, not a text",
    ),
    ("nested", lambda s: s.data("a.jsonl", [{"problem": {"a": 1}}]), "problem is of type dict"),
    (
        "a list",
        lambda s: s.data("a.jsonl", [{"problem": [1]}]),
        "something else than chat messages",
    ),
    (
        "half a character",
        lambda s: s.data("a.jsonl", r'{"problem": "\ud800"}'),
        "not valid Unicode",
    ),
    (
        "empty problems",
        lambda s: s.data("a.jsonl", [{"problem": " "}]),
        "a.jsonl:1: problem is empty",
    ),
    (
        "answers of another kind",
        lambda s: s.data("a.jsonl", [{"problem": "x", "answer": {"a": 1}}]),
        "answer is of type dict, neither a text nor a number",
    ),
    (
        "an answer that is no number",
        lambda s: s.data("a.jsonl", '{"problem": "x", "answer": NaN}'),
        "answer is not a finite number",
    ),
    (
        "control tokens only",
        lambda s: s.data("a.jsonl", [{"problem": "start <|im_end|>"}]),
        r"every problem was dropped \(1: the text contains a control token.*\): give other data",
    ),
    (
        "too long only",
        lambda s: s.data("a.jsonl", [{"problem": "start " * 100}]),
        r"every problem was dropped \(1: a prompt is over 40 tokens\): raise sampler.max_prompt",
    ),
    (
        "far too long",
        lambda s: s.data("a.jsonl", [{"problem": "start " * (LONGEST_LINE // 8)}]),
        r"every problem was dropped \(1: a prompt is over 40 tokens\)",
    ),
    (
        "no answer to grade with",
        lambda s: s.train(
            f"--config.eval.source={s.file('e.jsonl', json.dumps({'problem': 'x'}))}"
        ),
        "eval.source=.*e.jsonl.*answer",
    ),
]


@table(FILES + ROWS_THAT_LIE)
def test_refused(tmp_path, capfd, monkeypatch, arguments, says):
    assert_refused(Sandbox(tmp_path), capfd, monkeypatch, arguments, says)


def test_bad_rows_beside_good_ones_are_left_out_and_counted(tmp_path, capfd, monkeypatch):
    """What is wrong with a row is said with its line; the rest of the table is used."""
    sandbox = Sandbox(tmp_path)
    bad = [
        "7",
        '{"problem": null}',
        '{"problem": "start <|im_start|> 9"}',
        '{"problem": "start 1", "answer": 5}',
        json.dumps({"problem": "start " * 50}),
        '{"problem": "x", "answer": [1]}',
    ]
    name, *rest = sandbox.data("a.jsonl", LINES + "\n".join(bad))
    monkeypatch.setattr(script("train"), "train", lambda *_: False)
    assert cli.run(script(name).main, ["train.py", *rest]) == cli.EXIT_STOPPED
    out = capfd.readouterr().out
    assert "4 of 10 rows kept" in out
    assert "repeated problems: 1 rows, 1 with another answer; the first row counts" in out
    assert "dropped 1: the text contains a control token of the chat template" in out
    assert "dropped 1: a prompt is over 40 tokens" in out
    assert "bad rows: 3" in out
    assert "a.jsonl:5: is of type int, not an object with columns" in out
    assert "a.jsonl:10: answer is of type list" in out


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "..", "a b/c\x00d.jsonl", "x" * 5000])
def test_names_of_tables_are_no_paths(name):
    """A benchmark's folder in eval/ has the table's name, in plain characters."""
    from opsdc_jax.benchmarks import _plain_name

    plain = _plain_name(name)
    assert pathlib.PurePath(plain).name == plain not in ("", ".", "..")
    assert len(plain) <= 100


def test_a_hub_id_never_runs_a_script(tmp_path, monkeypatch):
    """A folder OWNER/NAME with a loading script in it, as old data sets had them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    marker = tmp_path / "executed"
    (tmp_path / "owner" / "name" / "name.py").write_text(f"open({str(marker)!r}, 'w')")
    with pytest.raises(InputError, match="owner/name' is a folder"):
        data.open_source("owner/name", 0)
    assert not marker.exists()
