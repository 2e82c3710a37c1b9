"""Rows with their place from files, the hub and TFDS; whatever cannot be read is one sentence."""

import functools
import json
import pathlib
import sys

import pytest

from opsdc_jax.config import InputError
from opsdc_jax.data.tables import TableName, read_rows

ROWS = [{"problem": f"p{index}", "answer": index} for index in range(3)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path, rows):
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def read(source, **options):
    return [tuple(row) for row in read_rows(TableName(str(source), **options))]


def test_jsonl_lines_are_counted_as_an_editor_does(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"problem": "\xc3\xa9\xe2\x80\xa8"}\r\n\n[1]\nnull')
    assert read(path) == [
        (f"{path}:1", {"problem": "é\u2028"}),
        (f"{path}:3", [1]),
        (f"{path}:4", None),
    ]


@pytest.mark.parametrize(
    "text",
    [json.dumps(ROWS), " \n " + json.dumps(ROWS, indent=1), "\n".join(map(json.dumps, ROWS))],
)
def test_json_is_an_array_or_one_object_a_line(tmp_path, text):
    path = tmp_path / "a.json"
    for mark in ("", "\ufeff"):
        path.write_text(mark + text, encoding="utf-8")
        assert read(path) == [(f"{path}:{number}", row) for number, row in enumerate(ROWS, 1)]


def test_parquet_rows_keep_their_nesting(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": "x"}], "reward_model": {"ground_truth": str(index)}}
        for index in range(1500)  # more than are read at a time
    ]
    path = write_parquet(tmp_path / "a.PARQUET", rows)
    assert read(path) == [(f"{path}:{number}", row) for number, row in enumerate(rows, 1)]


def test_a_glob_is_read_in_the_order_of_the_names(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "folder.jsonl").mkdir()
    for name in ("b.jsonl", "deep/c.json", "a.jsonl"):
        write_jsonl(tmp_path / name, [{"problem": name}])
    monkeypatch.chdir(tmp_path)
    assert [place for place, _ in read("*.jsonl")] == ["a.jsonl:1", "b.jsonl:1"]
    names = [row["problem"] for _, row in read("**/*.json*")]
    assert names == ["a.jsonl", "b.jsonl", "deep/c.json"]


def test_a_path_with_the_characters_of_a_glob_is_a_path(tmp_path):
    path = write_jsonl(tmp_path / "a[1].jsonl", ROWS)
    assert len(read(path)) == 3


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    assert len(read("~/a.jsonl")) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"problem": "x"}\n{"x": \n', r"a\.jsonl:2 holds broken JSON: Expecting"),
        ("a.jsonl", b'{"problem": "x"}\n{"prob', r"a\.jsonl:2 holds broken JSON: Unterminated"),
        ("a.jsonl", b'{"problem": "x"}\n{"problem": "\xff"}', r"a\.jsonl:2 is not UTF-8"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1 holds JSON that cannot be read"),
        ("a.jsonl", b"9" * 10_000, r"a\.jsonl:1 holds JSON that cannot be read"),
        ("a.json", b'[{"problem": "x"},\n {"problem": }]', r"a\.json:2 holds broken JSON"),
        ("a.json", b'{\n "data": []\n}', r"a\.json:1 holds broken JSON.* one array of objects"),
        ("a.json", b'["\xff"]', r"a\.json is not UTF-8"),
        ("a.parquet", b"", r"a\.parquet is no parquet, or damaged after row 0"),
        ("a.parquet", b"PAR1 and nothing else", r"a\.parquet is no parquet, or damaged"),
        ("a.csv", b"problem\nx", r"a\.csv ends in none of \.jsonl, \.json, \.parquet"),
        ("a", b"", r"a ends in none of"),
    ],
)
def test_damaged_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / name)


def test_a_parquet_file_damaged_in_the_middle(tmp_path):
    rows = [{"problem": f"{index:0>4}" * 50} for index in range(200)]
    path = write_parquet(tmp_path / "a.parquet", rows)
    data = path.read_bytes()
    path.write_bytes(data[:1000] + bytes(2000) + data[3000:])
    with pytest.raises(InputError, match=r"a\.parquet is no parquet, or damaged after row"):
        read(path)


def test_a_parquet_file_with_text_that_is_not_utf8(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    text = pa.array([b"fine", b"\xff"]).view(pa.string())
    pa.parquet.write_table(pa.table({"problem": text}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet is no parquet, or damaged .*decode byte"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.jsonl", "data.source='missing.jsonl': there is no such file"),
        ("no/such/missing.parquet", "there is no such file"),
        ("no*.jsonl", r"data.source='no\*.jsonl' matches no file"),
        ("folder", "is a folder: give a glob of its files"),
        ("mixed*", r"mixed\.txt ends in none of"),
        ("", "data.source='' is not known: give a .jsonl"),
        ("tinny", "data.source='tinny' is not known"),
        ("one/two/three", "is not known"),
        ("tfds:folder", "data.source='tfds:folder' cannot be read"),
        ("tfds:no_such_set", "Dataset no_such_set not found"),
    ],
)
def test_unknown_sources(tmp_path, monkeypatch, source, message):
    if source.startswith("tfds:"):
        pytest.importorskip("tensorflow_datasets", reason="pip install opsdc-jax[tfds]")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "mixed.jsonl", ROWS)
    (tmp_path / "mixed.txt").touch()
    with pytest.raises(InputError, match=message):
        read(source)


@pytest.mark.parametrize("option", ["split", "subset"])
def test_a_file_has_no_parts(tmp_path, option):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(InputError, match=f"eval.{option}='x' does not fit eval.source="):
        read(path, section="eval", **{option: "x"})


@pytest.fixture
def hub(monkeypatch):
    """Replaces the hub: gives out ROWS and lists the calls."""
    import datasets

    calls = []

    def load_dataset(path, name, *, split, revision):
        calls.append((path, name, split, revision))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize(
    ("source", "options", "calls"),
    [
        ("a/b", {}, [("a/b", None, "train", None)]),
        ("a/b@v1.0", {"default_split": "test"}, [("a/b", None, "test", "v1.0")]),
        ("a/b-c.d", {"split": "train[:80%]"}, [("a/b-c.d", None, "train[:80%]", None)]),
        ("a/b", {"subset": "x, y"}, [("a/b", "x", "train", None), ("a/b", "y", "train", None)]),
        ("openai/gsm8k", {}, [("openai/gsm8k", "main", "train", None)]),
        ("openai/gsm8k@abc", {"subset": "s"}, [("openai/gsm8k", "s", "train", "abc")]),
    ],
)
def test_hub_names(hub, source, options, calls):
    assert len(read(source, **options)) == 3 * len(calls)
    assert hub == calls


def test_hub_rows_have_a_place(hub):
    assert read("a/b@v1", split="test")[1] == ("a/b@v1 test:2", ROWS[1])
    assert read("a/b", subset="x,y")[3] == ("a/b y train:1", ROWS[0])


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)"),
        ValueError("Unknown split \"train\".\nShould be one of ['test']."),
        FileNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."),
        RuntimeError("Dataset scripts are no longer supported, but found b.py"),
    ],
)
def test_what_the_hub_complains_about_is_one_sentence(monkeypatch, error):
    import datasets

    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError) as caught:
        read("a/b", subset="s")
    message = str(caught.value)
    assert message.startswith("data.source='a/b' cannot be loaded (split 'train', subset 's'): ")
    assert " ".join(str(error).split()) in message
    assert "local file" in message
    assert "HF_HUB_OFFLINE=1" in message
    assert "\n" not in message


def test_the_real_library_offline(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(InputError, match=r"owner/no-such-set' cannot be loaded .*ConnectionError"):
        read("owner/no-such-set")


@functools.cache
def tfds_builder():
    """A builder of a TFDS data set as a project would write one."""
    tfds = pytest.importorskip("tensorflow_datasets", reason="pip install opsdc-jax[tfds]")
    import numpy as np

    class MadeByTheTests(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            text = tfds.features.Text()
            features = {
                "problem": text,
                "reward_model": {"ground_truth": text},
                "level": tfds.features.Scalar(np.int64),
                "prompt": tfds.features.Sequence({"role": text, "content": text}),
                "array": tfds.features.Tensor(shape=(None,), dtype=np.str_),
                "numbers": tfds.features.Sequence(np.int64),
            }
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(), "test": self._generate_examples()}

        def _generate_examples(self):
            for index in range(5):
                yield (
                    index,
                    {
                        "problem": f"Was ist {index}²?",
                        "reward_model": {"ground_truth": str(index**2)},
                        "level": index,
                        "prompt": [{"role": "user", "content": "x"}],
                        "array": ["a", "b"],
                        "numbers": [1],
                    },
                )

    return MadeByTheTests


@pytest.fixture
def tfds_folder(tmp_path):
    builder = tfds_builder()(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    return pathlib.Path(builder.data_dir)


def test_a_tfds_folder_is_read_without_tensorflow(tfds_folder):
    from opsdc_jax.data.columns import Columns, to_example

    rows = read(f"tfds:{tfds_folder}", split="test")
    assert "tensorflow" not in sys.modules
    assert [place for place, _ in rows] == [f"{tfds_folder} test:{n}" for n in range(1, 6)]
    examples = {to_example(row, Columns()) for _, row in rows}  # TFDS shuffles when it writes
    assert examples == {(f"Was ist {n}²?", str(n * n), str(n)) for n in range(5)}
    assert {to_example(row, Columns(problem="prompt")).problem for _, row in rows} == {"x"}
    assert rows[0][1]["array"] == [b"a", b"b"]
    assert type(rows[0][1]["numbers"][0]) is int


def test_a_tfds_name_is_looked_up_where_tfds_keeps_its_data(tfds_folder, monkeypatch):
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tfds_folder.parents[1]))
    assert len(read("tfds:made_by_the_tests", split="train[:2]")) == 2


def test_what_tfds_complains_about_is_one_sentence(tfds_folder):
    with pytest.raises(InputError, match=r"Unknown split 'val'.* check the name and eval\.split"):
        read(f"tfds:{tfds_folder}", split="val", section="eval")
    with pytest.raises(InputError, match="write tfds:NAME/CONFIG instead"):
        read(f"tfds:{tfds_folder}", subset="main")
    info = tfds_folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(InputError, match=r"cannot be read .*file_format='array_record'"):
        read(f"tfds:{tfds_folder}")


def test_without_tfds_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(InputError, match=r"pip install opsdc-jax\[tfds\]"):
        read("tfds:gsm8k")
