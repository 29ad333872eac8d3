"""A rank notices that its launcher was killed, and takes nobody else's end for that."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.processes import python_path

RANK = """
import sys, time
from pathlib import Path
from trainer.resilience import signals as module
from trainer.resilience.signals import StopRequest
from trainer.resilience.launcher_watch import LauncherWatch

module._POLL_EVERY = 0.2
with StopRequest(launcher_is_gone=LauncherWatch(sys.argv[1]).is_gone) as stop:
    Path(sys.argv[2]).write_text("began")
    for _ in range(20):
        if stop.poll():
            break
        time.sleep(0.1)
Path(sys.argv[2]).write_text(str(stop.poll()))
"""
# Each starts what stands after it, and waits.
STARTS = "import subprocess, sys; subprocess.run(sys.argv[1:])"


def wait_for(file: Path, *texts: str) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if file.exists() and (text := file.read_text()) in texts:
            return text
        time.sleep(0.05)
    raise TimeoutError(f"{file} says {file.read_text() if file.exists() else 'nothing'}")


@pytest.mark.parametrize(
    ("launcher", "name", "killed", "expected"),
    [
        ("deepspeed", "deepspeed", 0, "the end of its launcher"),
        ("deepspeed", "deepspeed", 1, "the end of its launcher"),
        ("deepspeed", "deepspeed-runs.py", 0, "None"),  # a script that may end before the launcher it started
        ("torchrun", "torchrun", 1, "the end of its launcher"),
        ("torchrun", "start.py", 0, "None"),
        ("variables", "start.py", 1, "None"),
    ],
)
def test_a_launcher_that_is_killed(
    tmp_path: Path, launcher: str, name: str, killed: int, expected: str
) -> None:
    """Two processes above the rank, the command and what it starts on the node; one of them is killed."""
    said, numbers = tmp_path / "said", tmp_path / "numbers"
    code = f"import os; open({str(numbers)!r}, 'a').write(f'{{os.getpid()}} '); {STARTS}"
    script = tmp_path / name
    script.write_text(code)
    process = subprocess.Popen(
        [sys.executable, script, sys.executable, "-c", code, sys.executable, "-c", RANK, launcher, str(said)],
        env={**os.environ, **python_path()},
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(said, "began")
        above = [int(number) for number in numbers.read_text().split()]
        os.kill(above[killed], signal.SIGKILL)
        if killed == 0:
            process.wait(10)
        assert wait_for(said, "None", "the end of its launcher") == expected
    finally:
        for number in (int(text) for text in numbers.read_text().split()):
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait(10)
