"""The benchmark of meshes: its figures are those of the run, and bad input is refused early."""

import dataclasses
import json

import pytest
from helpers import SMALL, load_script

from opsdc_jax.config import InputError

bench = load_script("bench_sharding")
ONE = {"replica": 1, "fsdp": 1, "tensor": 1}


def test_every_figure_is_there_and_adds_up(tmp_path):
    model = dataclasses.replace(SMALL, num_hidden_layers=1)
    work = bench.Work(model, batch=4, micro=2, prompt=4, response=4, steps=1)
    row = bench.measure(ONE, work)
    json.dumps(row)
    assert row["step_seconds"] == pytest.approx(
        row["rollout_seconds"] + row["update_seconds"], abs=2e-4
    )
    assert row["tokens_per_second"] == pytest.approx(4 * 4 / row["step_seconds"], rel=0.01)
    programs = ("rollout", "accumulate", "apply", "refresh")
    assert tuple(row["memory_gib"]) == tuple(row["compile_seconds"]) == programs
    assert row["collectives"] == {name: {} for name in programs}, "one device talks to nobody"
    assert row["loss"] > 0
    lines = bench.table([row, row]).splitlines()
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {9}
    bench.plot([row, row | {"mesh": "2x1"}], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_meshes_are_read_and_made():
    assert bench.parse_mesh("4x2") == {"replica": 1, "fsdp": 4, "tensor": 2}
    made = [(sizes["fsdp"], sizes["tensor"]) for sizes in bench.powers_of_two(12)]
    assert made == [(12, 1), (6, 2), (3, 4)]
    for bad in ("4", "4x", "0x4", "4x2x1", "-1x8"):
        with pytest.raises(InputError, match="FSDPxTENSOR"):
            bench.parse_mesh(bad)


@pytest.mark.parametrize(
    ("missing", "out", "says"),
    [("matplotlib", "results", "needs matplotlib"), ("nothing", "file", "cannot be written")],
)
def test_what_the_results_need_is_asked_for_first(monkeypatch, tmp_path, missing, out, says):
    (tmp_path / "file").write_text("", encoding="utf-8")
    found = bench.importlib.util.find_spec
    monkeypatch.setattr(
        bench.importlib.util, "find_spec", lambda name: None if name == missing else found(name)
    )
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("measured before"))
    with pytest.raises(InputError, match=says):
        bench.main(["bench_sharding.py", "--meshes=1x1", f"--out={tmp_path / out}"])


def test_what_cannot_be_split_is_refused_before_anything_is_compiled():
    work = bench.Work(SMALL, batch=4, micro=3, prompt=4, response=4, steps=1)
    with pytest.raises(InputError, match=r"--batch=4 is not a multiple of --micro_batch=3"):
        bench.check([ONE], work)
    with pytest.raises(InputError, match="devices"):
        bench.check([ONE | {"fsdp": 1024}], work)
