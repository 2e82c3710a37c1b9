"""metrics.jsonl survives resumes and torn lines; compilations are counted."""

import jax

from opsdc_jax.metrics import CompileCounter, MetricsFile, read_metrics


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
