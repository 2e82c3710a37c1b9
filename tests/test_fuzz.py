"""Whatever a file, a flag or an answer holds: a result or `InputError`, never another exception."""

import contextlib
import json
import pathlib
import shutil
import struct

import hypothesis
import pytest
from bad_inputs import TINY
from helpers import load_script
from hypothesis import strategies as st

from opsdc_jax import cli, config, data, grading
from opsdc_jax.benchmarks import _plain_name
from opsdc_jax.config import InputError, default_config, flatten
from opsdc_jax.data.columns import BadRowError, Columns, to_example
from opsdc_jax.data.files import EXTENSIONS, file_rows
from opsdc_jax.files import read_json, read_json_lines
from opsdc_jax.grading.equivalence import Undecided, equivalent
from opsdc_jax.grading.extract import extract
from opsdc_jax.metrics import read_metrics
from opsdc_jax.models import hf, weights
from opsdc_jax.planner import topology
from opsdc_jax.report.run import read_run
from opsdc_jax.results import SystemFiles, check_summary
from opsdc_jax.tiny import BASE_FOLDER
from opsdc_jax.tiny.tokenizer import build_tokenizer

hypothesis.settings.register_profile(
    "fuzz",
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=list(hypothesis.HealthCheck),
)
FUZZ = hypothesis.settings.get_profile("fuzz")

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 2),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "../x", "<|im_end|>", "\ud800", "start 1 + 2", "user", "1e999", "nan"]),
)
NAMES = st.sampled_from(
    [
        *("problem", "answer", "level", "choices", "role", "content", "reward_model", "prompt"),
        *("step", "index", "text", "ids", "scores", "benchmarks", "weight_map", "ground_truth"),
    ]
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=5),
    max_leaves=12,
)
OBJECTS = st.dictionaries(NAMES, JSON, max_size=6)
LINES = st.lists(JSON | OBJECTS, max_size=5).map(lambda v: "\n".join(map(json.dumps, v)).encode())
ARRAYS = st.lists(JSON, max_size=5).map(lambda values: json.dumps(values).encode())


@st.composite
def damaged(draw, whole):
    """Bytes in which a piece is missing, doubled or something else."""
    content = draw(whole)
    start = draw(st.integers(0, len(content)))
    end = draw(st.integers(start, len(content)))
    return content[:start] + draw(st.binary(max_size=6)) + content[end:]


CONTENTS = st.one_of(st.binary(max_size=60), LINES, ARRAYS, damaged(LINES), damaged(ARRAYS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def refused_or(call):
    """What a call gives; None where it refuses its input."""
    with contextlib.suppress(InputError):
        return call()


@FUZZ
@hypothesis.given(CONTENTS, st.sampled_from(EXTENSIONS))
def test_files_of_rows(folder, content, extension):
    path = folder / f"rows{extension}"
    path.write_bytes(content)
    for row in refused_or(lambda: list(file_rows(str(path)))) or []:
        assert row.place.startswith(str(path))


@FUZZ
@hypothesis.given(damaged(st.just((BASE_FOLDER / "config.json").read_bytes())))
def test_any_bytes_for_a_configuration(folder, content):
    (folder / "config.json").write_bytes(content)
    found = refused_or(lambda: hf.load_config(folder))
    assert found is None or found.num_attention_heads % found.num_key_value_heads == 0


@FUZZ
@hypothesis.given(JSON | OBJECTS, st.builds(Columns, NAMES | st.just(""), NAMES | st.just("")))
def test_rows(row, columns):
    with contextlib.suppress(BadRowError):
        example = to_example(row, columns)
        assert example.problem.strip()
        assert all(isinstance(text, str) for text in example)
        "".join(example).encode()


@FUZZ
@hypothesis.given(st.lists(OBJECTS, max_size=6), st.sampled_from([None, "no good"]))
def test_tables(folder, rows, reason):
    path = folder / "table.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = refused_or(lambda: data.open_source(str(path), 0, accept=lambda _: reason))
    if source is not None:
        assert len(source.train(1, 3)) == 3
        assert f"of {len(rows)} rows kept" in source.report


@FUZZ
@hypothesis.given(CONTENTS)
def test_files_of_a_run(folder, content):
    """The three readers of JSON, and what stands on them."""
    path = folder / "file.jsonl"
    path.write_bytes(content)
    refused_or(lambda: read_json(path))
    refused_or(lambda: list(read_json_lines(path, {"index": int, "text": str})))
    for row in refused_or(lambda: read_metrics(path)) or []:
        assert isinstance(row["step"], int)
    files = SystemFiles(folder, "file")
    refused_or(lambda: list(files.rows()))
    shutil.copy(path, files.grades)
    refused_or(files.read_grades)


@FUZZ
@hypothesis.given(st.dictionaries(st.sampled_from(["benchmarks", "x"]), JSON | OBJECTS))
def test_summaries(summary):
    refused_or(lambda: check_summary(pathlib.Path("summary.json"), summary))


@FUZZ
@hypothesis.given(
    CONTENTS, st.sampled_from(["config.json", "metrics.jsonl", "samples/tokens-1.jsonl"])
)
def test_runs(folder, content, name):
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    (run / "samples").mkdir(parents=True)
    (run / "config.json").write_text(default_config().to_json())
    (run / name).write_bytes(content)
    refused_or(lambda: read_run(run))


@st.composite
def safetensors_bytes(draw):
    """A header that may describe anything, its length, which may be a lie, and some bytes."""
    number = st.integers(-1, 40) | st.sampled_from([2**31, 2**63, 2**64])
    tensor = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "BF16", "I64", "F99"]) | LEAVES,
            "shape": st.lists(number, max_size=3) | LEAVES,
            "data_offsets": st.lists(number, min_size=2, max_size=2) | LEAVES,
        }
    )
    names = st.sampled_from(["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"])
    header = json.dumps(draw(st.dictionaries(names, tensor | JSON, max_size=3))).encode()
    length = draw(st.just(len(header)) | st.integers(0, 2**64 - 1))
    return struct.pack("<Q", length) + header + draw(st.binary(max_size=64))


@FUZZ
@hypothesis.given(safetensors_bytes() | st.binary(max_size=64))
def test_headers_of_safetensors(folder, content):
    model = hf.load_config(BASE_FOLDER)
    path = folder / "headers" / "model.safetensors"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(InputError):  # none of them can be the whole model
        weights.check_files(path.parent, model)


@FUZZ
@hypothesis.given(st.dictionaries(st.sampled_from(["model.norm.weight", "x"]), LEAVES) | JSON)
def test_indices_of_safetensors(folder, weight_map):
    model = hf.load_config(BASE_FOLDER)
    path = folder / "indices" / weights.INDEX
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError):
        weights.check_files(path.parent, model)


ROPE = st.dictionaries(
    st.sampled_from(["rope_theta", "rope_type", "type", "factor", "truncate", "beta_fast"])
    | st.just("original_max_position_embeddings"),
    LEAVES | st.sampled_from(["default", "yarn", 1e4]),
)
ARCHITECTURE = json.loads((BASE_FOLDER / "config.json").read_text())


@FUZZ
@hypothesis.given(
    st.dictionaries(st.sampled_from(sorted(ARCHITECTURE)), JSON, max_size=2),
    st.dictionaries(st.sampled_from(["rope_parameters", "rope_scaling"]), ROPE | JSON),
)
def test_architectures(folder, changes, rope):
    (folder / "config.json").write_text(json.dumps(ARCHITECTURE | changes | rope))
    found = refused_or(lambda: hf.load_config(folder))
    if found is not None:
        assert 0 < found.rope_theta < float("inf")
        assert 0 < found.num_hidden_layers <= 1000


@FUZZ
@hypothesis.given(JSON)
def test_ends_of_responses(folder, listed):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    found = refused_or(lambda: hf.stop_token_ids(folder, build_tokenizer()))
    assert found is None or all(type(token) is int and token >= 0 for token in found)


KEYS = st.sampled_from(sorted(flatten(default_config())))


@FUZZ
@hypothesis.given(st.dictionaries(KEYS, JSON, max_size=2))
def test_values_of_a_configuration(values):
    settings = default_config()
    with settings.unlocked(), settings.ignore_type():
        for key, value in values.items():
            section, _, name = key.rpartition(".")
            (config.get(settings, section) if section else settings)[name] = value
    with contextlib.suppress(InputError):
        config.validate(settings)
        settings.to_json()


@FUZZ
@hypothesis.given(
    st.lists(
        st.tuples(KEYS | st.text(max_size=6), st.text(max_size=8) | st.sampled_from(["nan", "1"])),
        max_size=2,
    ),
    st.lists(
        st.text(max_size=4) | st.sampled_from(["--debug", "--", "-x", "--config"]), max_size=2
    ),
)
def test_command_lines(overrides, more):
    argv = ["x.py", "--config", TINY, *(f"--config.{k}={v}" for k, v in overrides), *more]
    values = cli.config_flag_values(argv)
    with contextlib.suppress(InputError):
        config.validate(cli.parse(values, argv).config)


@FUZZ
@hypothesis.given(
    st.text(max_size=12)
    | st.lists(st.sampled_from(["v5e", ":", "cpu", "gpu", "x", "H100", "4", "0", "²"])).map("".join)
)
def test_names_of_topologies_and_meshes(name):
    found = refused_or(lambda: topology.parse(name))
    assert found is None or found.devices > 0
    refused_or(lambda: list(topology.slices(name)))
    refused_or(lambda: PLAN.set_mesh(default_config(), name))


PLAN = load_script("plan")


@FUZZ
@hypothesis.given(st.text(max_size=300))
def test_names_of_folders(source):
    name = _plain_name(source)
    assert pathlib.PurePath(name).name == name
    assert name.isascii()
    assert not name.startswith(".")


PIECES = st.sampled_from(
    [
        *(r"\boxed{", "}", "{", r"\frac", r"\frac{1}{2}", r"\sqrt", r"\text{", "$", r"\(", r"\)"),
        *("Answer:", "answer is", "**", "\n", " ", ",", ";", "or", "and", "=", "x", "-", "+", "%"),
        *("<think>", "</think>", "1", "0.5", "1e9", "9" * 30, "1/0", "0/0", r"\infty", "(", ")"),
        *("[", "]", "|", r"\pi", "^", "_", "_8", "A", "(B)", "east", "½", "−", "°", "\u200b", "٣"),
        *(r"\begin{pmatrix}", r"\end{pmatrix}", "&", r"\\", r"\cup", "#### ", "\x00", "\ud800"),
    ]
)
ANSWERS = st.lists(PIECES, max_size=14).map("".join) | st.text(max_size=30)


@hypothesis.settings(FUZZ, max_examples=300)
@hypothesis.given(ANSWERS, ANSWERS)
def test_answers(response, gold):
    """As far as they are compared without math-verify, which has a time limit of its own."""
    for answer in {response, *filter(None, extract(response))}:
        with contextlib.suppress(Undecided):
            assert equivalent(answer, gold, quick=True) in (True, False)
    assert grading.committed_answer(response) is None or response


@hypothesis.settings(FUZZ, max_examples=150)
@hypothesis.given(ANSWERS)
def test_an_answer_equals_itself(answer):
    assert equivalent(answer, answer, quick=True) == bool(answer.strip())
