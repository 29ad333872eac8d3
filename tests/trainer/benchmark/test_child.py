"""The processes of measurements: failures, the timeout, and their end with the command."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.processes import PATIENCE, python_path
from trainer.benchmark.child import MeasurementError, run_child, run_children
from trainer.benchmark.scaling import _variables

RANK = {"preset": "tiny", "frames": 4, "batch": 2, "device": "cpu", "core": None, "steps": 1}


def test_a_rank_that_fails_ends_the_others_and_is_named(tmp_path):
    tasks = [{**RANK, "folder": str(tmp_path)}, {"no preset": 1}]  # rank 0 waits for rank 1
    with pytest.raises(MeasurementError, match=r"^rank 1 of 2 ended with code 1: .*no preset"):
        run_children("scaling_task:measure_rank", tasks, threads=1, variables=_variables(2), timeout=120)


def test_a_measurement_that_takes_too_long_names_the_option():
    with pytest.raises(MeasurementError, match=r"did not end within 0\.1 s; .*--timeout SECONDS"):
        run_child("scaling_task:measure_rank", {}, threads=1, timeout=0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="by the kernel's signal for a parent's end")
def test_a_measurement_ends_with_the_command_that_is_killed(tmp_path):
    rank = {**RANK, "folder": str(tmp_path)}
    script = (
        "from trainer.benchmark.child import run_children\n"
        "from trainer.benchmark.scaling import _variables\n"
        f"run_children('scaling_task:measure_rank', [{rank!r}], threads=1, variables=_variables(2)[:1])\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], env={**os.environ, **python_path()}) as command:
        children = Path(f"/proc/{command.pid}/task/{command.pid}/children")
        while not (child := children.read_text()):
            assert command.poll() is None
            time.sleep(0.02)
        command.send_signal(signal.SIGKILL)
    # Without the kernel's signal, it waits for rank 1 for half an hour.
    deadline = time.monotonic() + PATIENCE
    while _runs(int(child)) and time.monotonic() < deadline:
        time.sleep(0.02)
    is_left = _runs(int(child))
    if is_left:
        os.kill(int(child), signal.SIGKILL)
    assert not is_left


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in ("Z", "X")
