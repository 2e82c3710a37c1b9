"""Benchmarks by name: where they come from, what they are called, what is refused."""

import json

import pytest
from helpers import ROOT

from opsdc_jax import benchmarks, data
from opsdc_jax.config import InputError


def opened(names, **options):
    return benchmarks.open_benchmarks(names, 0, **options)


def write(path, count=3):
    rows = [{"problem": f"p{number}", "answer": number} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_tiny_has_fresh_problems_of_every_level():
    (tiny,) = opened("tiny", samples_per_level=4)
    assert tiny.name == tiny.source == "tiny"
    assert tiny.examples == data.tiny_evaluation(0, 4)
    (fewer,) = opened("tiny", samples_per_level=4, limit=6)
    assert [example.level for example in fewer.examples] == [
        *("easy", "easy", "medium", "medium", "hard", "hard")
    ]
    assert fewer.fingerprint != tiny.fingerprint


def test_a_file_is_called_by_its_stem_in_plain_characters(tmp_path):
    (found,) = opened(write(tmp_path / "my problems (2).JSONL"))
    assert found.name == "my_problems_2"
    assert len(found.examples) == 3
    assert "3 of 3 rows kept" in found.report
    assert opened(write(tmp_path / "°.jsonl"))[0].name == "benchmark"


def test_the_fingerprint_follows_the_problems(tmp_path):
    fingerprints = {
        opened(write(tmp_path / f"{count}.jsonl", count))[0].fingerprint for count in (2, 3)
    }
    (first,) = opened(write(tmp_path / "other.jsonl", 3))
    assert len(fingerprints) == 2
    assert first.fingerprint in fingerprints


@pytest.mark.parametrize(
    ("name", "source", "subsets"),
    [
        ("math500", "HuggingFaceH4/MATH-500", [(None, "test")]),
        ("aime24", "HuggingFaceH4/aime_2024", [(None, "train")]),
        ("aime25", "yentinglin/aime_2025", [(None, "train")]),
        ("gsm8k", "openai/gsm8k", [("main", "test")]),
        ("mmlu", "cais/mmlu", 18),
    ],
)
def test_a_known_name_stands_for_a_published_data_set(monkeypatch, name, source, subsets):
    import datasets

    asked = []

    def load_dataset(path, subset, *, split, revision):
        assert (path, revision) == (source, None)
        asked.append((subset, split))
        row = {"question": f"{subset}?", "answer": 1}
        row |= {"choices": ["x", "y"]} if name == "mmlu" else {}
        return datasets.Dataset.from_list([row])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (found,) = opened(name)
    assert found.name == name
    if name == "mmlu":
        assert len(asked) == len(found.examples) == subsets
        assert {split for _, split in asked} == {"test"}
        assert {example.answer for example in found.examples} == {"B"}
    else:
        assert asked == subsets


def test_several_are_opened_in_their_order(tmp_path):
    names = f"tiny, {write(tmp_path / 'a.jsonl')}"
    assert [found.name for found in opened(names, samples_per_level=1)] == ["tiny", "a"]
    assert opened("none") == []


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ("math501", {}, "eval.source='math501' is not known"),
        ("", {}, "eval.source='' is not known"),
        ("tiny,tiny", {"samples_per_level": 1}, "would both be called 'tiny'"),
        ("tiny", {"table": {"split": "test"}}, "eval.split describes one table"),
        ("math500,gsm8k", {"table": {"level_column": "x"}}, "eval.level_column describes one"),
    ],
)
def test_what_cannot_be_is_refused(names, options, message):
    with pytest.raises(InputError, match=message):
        opened(names, **options)


@pytest.mark.parametrize(
    ("file", "count", "levels"),
    [
        ("math500.jsonl", 500, 5),
        ("aime24.jsonl", 30, 0),
        ("aime25.jsonl", 30, 0),
        ("gsm8k_test.jsonl", 1319, 0),
        ("mmlu_stem_400.jsonl", 400, 0),
    ],
)
def test_published_files_are_read_as_they_are(file, count, levels):
    path = ROOT.parent / "shared" / "data" / file
    if not path.exists():
        pytest.skip(f"needs ../shared/data/{file} beside the checkout")
    (found,) = opened(str(path))
    assert found.name == file.removesuffix(".jsonl")
    assert count - 3 <= len(found.examples) <= count  # MMLU repeats some
    assert all(example.answer for example in found.examples)
    assert len({example.level for example in found.examples} - {""}) == levels
