"""What the environment asks for, and a lone process; test_multi_device.py runs two."""

import os
import signal
import subprocess
import sys

import jax
import pytest

from opsdc_jax import distributed
from opsdc_jax.config import InputError

ADDRESS = "JAX_COORDINATOR_ADDRESS"


@pytest.fixture
def joined(monkeypatch):
    """A function: the arguments of jax.distributed.initialize in an environment, None if unused."""

    def initialize(environment):
        calls = []
        monkeypatch.setattr(jax.distributed, "initialize", lambda *given: calls.append(given))
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        distributed.initialize()
        return calls[0] if calls else None

    for name in (ADDRESS, "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    for name in ("SLURM_NTASKS", "SLURM_STEP_NODELIST", "OPSDC_DISTRIBUTED"):
        monkeypatch.delenv(name, raising=False)
    return initialize


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (
            {ADDRESS: "host0:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"},
            ("host0:1234", 4, 3),
        ),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "node[1-2]"}, ()),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "node1"}, None),
        ({"SLURM_NTASKS": "2"}, None),  # in a script of sbatch, outside srun
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, ()),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"OPSDC_DISTRIBUTED": "1"}, ()),
    ],
)
def test_the_environment_decides(joined, environment, expected):
    assert joined(environment) == expected
    assert distributed.is_first()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({ADDRESS: "a:1"}, "JAX_NUM_PROCESSES, JAX_PROCESS_ID must be set too"),
        ({ADDRESS: "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "=2 is not in 0..1"),
        ({ADDRESS: "a:1", "JAX_NUM_PROCESSES": "x", "JAX_PROCESS_ID": "0"}, "whole numbers"),
    ],
)
def test_half_an_environment_is_refused(joined, environment, message):
    with pytest.raises(InputError, match=message):
        joined(environment)


def test_a_lone_process_agrees_with_itself():
    distributed.wait_for_all("nobody else")
    assert [distributed.any_process(flag) for flag in (True, False)] == [True, False]


def test_what_the_first_process_returns_is_returned():
    assert distributed.first_does(lambda: 3) == 3
    assert distributed.first_does(lambda: None) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_request_inside_and_what_it_was_outside(number, capfd):
    before = signal.getsignal(number)
    with distributed.stop_requests() as asked:
        assert not asked()
        os.kill(os.getpid(), number)
        assert asked()
    assert signal.getsignal(number) is before
    assert f"{number.name}: stopping soon; once more quits at once" in capfd.readouterr().err


def test_a_later_signal_ends_the_process_even_where_python_waits():
    waits = """if True:
        import hashlib
        from opsdc_jax import distributed
        with distributed.stop_requests():
            print("inside", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes without a handler
    """
    process = subprocess.Popen(
        [sys.executable, "-c", waits], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "inside\n"
    process.send_signal(signal.SIGTERM)
    assert "once more" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)  # at once: the same request
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 128 + signal.SIGINT
