"""8 host devices on any mesh, and two processes of 4 each, give what one device gives."""

import json
import math
import os
import re
import socket
import subprocess
import sys

import many_devices
import pytest
from helpers import ROOT, random_params

from opsdc_jax import cli
from opsdc_jax.files import read_json
from opsdc_jax.metrics import read_metrics
from opsdc_jax.models import hf
from opsdc_jax.tiny.tokenizer import build_tokenizer

PROMPT_WIDTH = 32  # that the sampler pads the prompts of these runs to


def start(devices, *arguments, **environment):
    """tests/many_devices.py in a process that has so many devices."""
    # Most of the time goes into compiling programs that run for milliseconds.
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "many_devices.py"), *map(str, arguments)],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output(process):
    """What it printed, once it ended well."""
    printed, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-4000:]
    return printed


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a random model that fits every mesh of 8, and the tiny tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("models") / "eight", build_tokenizer()
    hf.save_folder(
        folder,
        random_params(many_devices.EIGHT, 0),
        many_devices.EIGHT,
        eos_token_ids=[tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def meshes(base, tmp_path_factory):
    """The process that trains on every mesh, started, and the folder of its runs."""
    out = tmp_path_factory.mktemp("meshes")
    return start(8, "meshes", base, out), out


@pytest.fixture(scope="module")
def one_device(base, meshes, tmp_path_factory):
    """The run of this process, on one device, while the meshes run."""
    workdir = tmp_path_factory.mktemp("runs") / "1x1"
    assert many_devices.train(str(base), workdir) == cli.EXIT_DONE
    return workdir


@pytest.fixture(scope="module")
def programs(meshes):
    """What the programs of the mesh 8x1 do."""
    return json.loads(output(meshes[0]).splitlines()[-1])


def samples(path):
    return json.loads(path.read_text())


def assert_the_same_run(workdir, expected):
    rows, expected_rows = (read_metrics(path / "metrics.jsonl") for path in (workdir, expected))
    assert [row["step"] for row in rows] == list(range(1, many_devices.STEPS + 1))
    for row, other in zip(rows, expected_rows, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
        name = f"step-{row['step']:06d}.json"
        assert samples(workdir / "samples" / name) == samples(expected / "samples" / name)
    losses = [row["loss"] for row in expected_rows]
    assert max(losses) > 1.1 * min(losses) > 0, "nothing is learned: this compares nothing"


@pytest.mark.parametrize("mesh", many_devices.MESHES)
def test_every_mesh_of_eight_devices_is_one_device(mesh, one_device, meshes, programs):
    _, out = meshes
    assert_the_same_run(out / mesh, one_device)
    compiled = [row["compilations"] for row in read_metrics(out / mesh / "metrics.jsonl")]
    assert compiled[-1] == compiled[-2], "a step of known shapes compiles nothing"


def test_two_processes_are_one_device_even_when_stopped_between(base, one_device, tmp_path, capsys):
    """They go on with another mesh, and the same run goes on in one process as well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [
        start(
            4,
            "process",
            base,
            tmp_path / "run",
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(number),
        )
        for number in range(2)
    ]
    first, second = map(output, processes)
    assert "stopped after step 3: the same command continues" in first
    assert "continuing after step 3" in first
    assert "step" not in second, "only the first process prints"
    assert_the_same_run(tmp_path / "run", one_device)
    summary, expected = (path / "eval" / "summary.json" for path in (tmp_path / "run", one_device))
    assert read_json(summary) == read_json(expected)
    assert many_devices.train(str(base), tmp_path / "stopped") == cli.EXIT_DONE
    printed = capsys.readouterr().out
    assert (
        "continuing after step 3 (devices: '8 x cpu' -> '1 x cpu'; processes: 2 -> 1: " in printed
    )
    assert_the_same_run(tmp_path / "stopped", one_device)


def test_decoding_gathers_no_weight_for_a_token(programs):
    decode, model = programs["decode"], many_devices.EIGHT
    assert decode["loops"] >= 1, "over the tokens"
    assert decode["reductions"], "sums over split heads come together, if nothing else"
    smallest = model.hidden_size * model.num_key_value_heads * model.head_dim
    assert max(decode["gathered"], default=0) < smallest


@pytest.mark.parametrize("drawing", ["greedy", "drawn"])
def test_neither_wide_decoding_nor_slots_over_devices_change_a_response(drawing, programs):
    """Wider than the key/value heads; in several segments, whose ring grows."""
    narrow, *others = programs[drawing]
    assert len({tuple(response) for response in narrow}) > many_devices.ROWS / 2
    assert len({len(response) for response in narrow}) > 3
    assert max(map(len, narrow)) == many_devices.RESPONSE
    assert len(others) == 3
    for other in others:
        assert other == narrow


def test_neither_a_refill_nor_another_size_moves_the_cache_between_devices(programs):
    segments = programs["segments"]
    assert segments["advance"], "rows' results come together, if nothing else"
    exchanged = [shape for shapes in segments.values() for shape in shapes]
    for columns in (many_devices.COLUMNS, many_devices.COLUMNS // 2):
        assert not [shape for shape in exchanged if str(columns) in re.findall(r"\d+", shape)]


def test_no_weight_travels_whole_to_where_it_decodes(programs):
    """Split by heads or width first: half of a layer's largest is the most that anyone gathers."""
    model = many_devices.EIGHT
    shapes = programs["segments"]["layout"]
    assert shapes
    arrays = [dims for shape in shapes for dims in re.findall(r"\[([\d,]+)\]", shape)]
    sizes = [math.prod(map(int, dims.split(","))) for dims in arrays]
    assert max(sizes) <= model.hidden_size * model.intermediate_size // 2


def test_no_segment_exchanges_logits(programs):
    """Neither the vocabulary nor a part of it is in a shape that travels."""
    parts = {str(many_devices.EIGHT.vocab_size // n) for n in (1, 2, 4, 8)}
    for program in ("refill", "advance"):
        for shape in programs["segments"][program]:
            assert not parts & set(re.findall(r"\d+", shape)), (program, shape)


def test_the_cache_is_split_over_devices(programs):
    shapes = programs["decode"]["shapes"]
    slots = PROMPT_WIDTH + many_devices.RESPONSE
    assert f"f32[{many_devices.ROWS},1,{slots},16]" in shapes
    assert f"f32[{many_devices.ROWS},8,{slots},16]" not in shapes


def test_moments_are_split_as_the_parameters_are(programs):
    assert programs["train"]["parts"] == [8]


def test_a_skipped_step_changes_nothing_on_any_device(programs):
    assert programs["train"]["unchanged"]


def test_a_refresh_writes_into_the_teachers_own_buffers(programs):
    train = programs["train"]
    assert train["output"] >= train["aliased"] >= train["teacher"], "bytes, some for alignment"
    assert train["moved"] == [], "neither between devices nor to the host"
