"""Two runs in one folder, and the files that a killed run leaves, with real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import MotionSet
from tests.integration.processes import ROOT, SMALL, Training, events, settings, train
from trainer.resilience.stale_semaphores import SHARED_MEMORY

LONG = settings(optimisation__steps=2000, run__checkpoint_every_steps=2)


def semaphores() -> set[str]:
    return {path.name for path in SHARED_MEMORY.glob("sem.mp-*")} if SHARED_MEMORY.is_dir() else set()


@pytest.mark.soak
def test_a_second_run_is_refused_and_the_next_start_after_a_kill_cleans_up(
    motion_set: MotionSet, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    first = Training(run_dir, *LONG, data=motion_set.root)
    try:
        before = semaphores()
        first.wait_for_step(2)
        second = train(run_dir, *LONG, data=motion_set.root, ranks=2)
        assert second.code == 2
        assert f"in use by process {first.processes[0].pid}" in second.errors
        assert "--run-dir" in second.errors and "Traceback" not in second.errors
        assert first.processes[0].poll() is None
        assert len(events(run_dir, "start")) == 1
        made = semaphores() - before
    finally:
        with suppress(ProcessLookupError):  # with its worker processes and their resource tracker
            os.killpg(first.processes[0].pid, signal.SIGKILL)
        first.processes[0].wait()
    left = semaphores() & made
    assert left
    again = Training(run_dir, *LONG, data=motion_set.root)
    again.wait_until(lambda: len(events(run_dir, "start")) == 2)
    again.wait_for_step(max(event["step"] for event in events(run_dir, "step")) + 1)
    again.signal(signal.SIGINT)
    outcome = again.wait()
    assert outcome.code == 130, outcome.errors
    assert f"{len(left)} semaphores were removed" in outcome.output + outcome.errors
    assert not semaphores() & left
    assert json.loads(max((run_dir / "lock").iterdir()).read_text())["released"] is True


@pytest.mark.soak
def test_ranks_save_and_end_when_their_launcher_is_killed_and_hold_the_lock_until_then(
    motion_set: MotionSet, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    program = Path(sys.executable).with_name("deepspeed")
    command = [str(program), "--num_gpus", "2", "--master_port", "29617", "launch/train.py"]
    data = settings(data__train=motion_set.train, data__val=motion_set.val)
    launcher = subprocess.Popen(
        [*command, "--recipe", str(SMALL), "--run-dir", str(run_dir), *data, *LONG],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: bool(events(run_dir, "step")))
    finally:
        launcher.kill()
        launcher.wait()
    assert json.loads(max((run_dir / "lock").iterdir()).read_text())["released"] is False
    wait_until(lambda: bool(events(run_dir, "left")))
    wait_until(lambda: json.loads(max((run_dir / "lock").iterdir()).read_text())["released"] is True)
    (left,) = events(run_dir, "left")
    assert left["reason"] == "the end of its launcher"
    assert (run_dir / "checkpoints" / f"step-{left['step']:07d}" / "state.json").exists()


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)
