"""metrics.jsonl survives resumes and torn lines; its mirrors; compilations are counted."""

import importlib.util
import math
import struct
import sys
import types

import jax
import pytest
from helpers import full_disk

from opsdc_jax.config import InputError, default_config
from opsdc_jax.metrics import (
    CompileCounter,
    MetricsFile,
    check_mirrors,
    open_mirrors,
    read_metrics,
)


def write(path, last_step, steps):
    with MetricsFile(path, last_step) as file:
        for step in steps:
            file.write({"step": step, "loss": step / 10})


def test_rows_come_back(tmp_path):
    write(tmp_path / "m.jsonl", 0, [1, 2])
    assert read_metrics(tmp_path / "m.jsonl") == [
        {"step": 1, "loss": 0.1},
        {"step": 2, "loss": 0.2},
    ]


def test_resuming_cuts_the_steps_that_are_run_again(tmp_path):
    write(tmp_path / "m.jsonl", 0, [1, 2, 3, 4])
    write(tmp_path / "m.jsonl", 2, [3])
    assert [row["step"] for row in read_metrics(tmp_path / "m.jsonl")] == [1, 2, 3]


def test_a_torn_last_line_is_dropped(tmp_path):
    write(tmp_path / "m.jsonl", 0, [1, 2])
    with (tmp_path / "m.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert len(read_metrics(tmp_path / "m.jsonl")) == 2
    write(tmp_path / "m.jsonl", 2, [3])
    assert [row["step"] for row in read_metrics(tmp_path / "m.jsonl")] == [1, 2, 3]


def test_what_is_not_finite_is_null_in_the_file_and_nan_in_python(tmp_path):
    path = tmp_path / "m.jsonl"
    with MetricsFile(path, 0) as file:
        file.write({"step": 1, "loss": math.nan, "grad_norm": math.inf})
    for _ in range(2):  # the second time as rewritten by a run that continues
        assert path.read_text() == '{"step": 1, "loss": null, "grad_norm": null}\n'
        (row,) = read_metrics(path)
        assert math.isnan(row["loss"])
        assert math.isnan(row["grad_norm"])
        MetricsFile(path, 1).__exit__()


def test_no_file_means_no_rows(tmp_path):
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_counter_counts_compilations_from_its_creation():
    double = jax.jit(lambda x: x * 2)
    double(1.0)
    counter = CompileCounter()
    double(2.0)
    assert (counter.count, counter.seconds) == (0, 0.0)
    double(3)  # another dtype
    assert counter.count == 1
    assert counter.seconds > 0


def config(**log):
    settings = default_config()
    settings.log.update(log)
    return settings


def written(path, last_step, steps, settings):
    mirrors = open_mirrors(path, settings, last_step)
    with MetricsFile(path / "metrics.jsonl", last_step, mirrors) as file:
        for step in steps:
            file.write({"step": step, "loss": step / 8})


def events(folder):
    """(step, name, value) of every scalar in the event files of a folder, oldest file first.

    An event file is a sequence of records: length (uint64), its checksum, the event, its checksum.
    """
    from tensorboardX.proto import event_pb2

    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                yield event.step, value.tag, value.simple_value


def test_by_default_there_is_only_the_file(tmp_path):
    assert open_mirrors(tmp_path, default_config(), 0) == []


def test_a_row_that_is_missing_is_told(tmp_path, capsys):
    write(tmp_path / "m.jsonl", 0, [1, 3])
    write(tmp_path / "m.jsonl", 3, [])
    assert "lacks 1 steps, the first is 2" in capsys.readouterr().out


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path):
    file = MetricsFile(tmp_path / "m.jsonl", 0)
    with full_disk(4):
        for write_on in (lambda: file.write({"step": 1}), file.__exit__):
            with pytest.raises(InputError, match=r"m.jsonl cannot be written \(File too large\)"):
                write_on()


def test_tensorboard_gets_every_number_and_a_resumed_run_repeats_none(tmp_path):
    pytest.importorskip("tensorboardX")
    settings = config(tensorboard=True)
    written(tmp_path, 0, [1, 2, 3], settings)
    scalars = [event for event in events(tmp_path / "tensorboard") if event[1] == "loss"]
    assert scalars == [(1, "loss", 0.125), (2, "loss", 0.25), (3, "loss", 0.375)]
    for path in (tmp_path / "tensorboard").iterdir():
        path.rename(f"{path}.0")  # within one second the new file would have its name
    written(tmp_path, 2, [3], settings)
    assert [event for event in events(tmp_path / "tensorboard") if event[1] == "loss"] == scalars
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_weights_and_biases_continues_the_run_of_the_folder(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, row, step):
            calls.append((row, step))

        def finish(self):
            calls.append("finished")

    def init(**arguments):
        calls.append(arguments)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for last_step, steps in ((0, [1]), (1, [2])):
        written(tmp_path, last_step, steps, config(wandb=True))
    assert calls[1:3] == [({"step": 1, "loss": 0.125}, 1), "finished"]
    assert calls[4:] == [({"step": 2, "loss": 0.25}, 2), "finished"]
    assert calls[0] == calls[3], "the same id, so that it continues"
    assert calls[0]["resume"] == "allow"
    assert calls[0]["config"]["log"]["wandb"] is True
    assert calls[0]["name"] == tmp_path.name


@pytest.mark.parametrize(("key", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_mirror_that_is_not_installed_is_named(key, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_mirrors(default_config().log)
    with pytest.raises(InputError, match=rf"needs the package {package}.*opsdc-jax\[{key}\]"):
        check_mirrors(config(**{key: True}).log)
