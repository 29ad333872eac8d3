"""Semaphores that killed processes leave are removed by the next start of the same run, and no others."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.resilience.stale_semaphores import SHARED_MEMORY, remove_left_semaphores

ROOT = Path(__file__).parents[3]
MAKE = (
    "import multiprocessing, sys, time\n"
    "from pathlib import Path\n"
    "from trainer.resilience.stale_semaphores import mark_semaphores\n"
    "if __name__ == '__main__':\n"
    "    mark_semaphores(Path(sys.argv[1]))\n"
    "    context = multiprocessing.get_context('spawn')\n"
    "    locks = [context.Lock() for _ in range(3)]\n"
    "    print(locks[0]._semlock.name, flush=True)\n"
    "    time.sleep(600)\n"
)


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="needs /dev/shm")
def test_what_a_killed_process_of_the_run_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    runs = [tmp_path / "one", tmp_path / "other"]
    groups = [
        subprocess.Popen(
            [sys.executable, "-c", MAKE, str(run)], stdout=subprocess.PIPE, text=True, start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        for run in runs
    ]  # fmt: skip
    try:
        names = []
        for process in groups:
            assert process.stdout is not None
            names.append(process.stdout.readline().strip().lstrip("/"))
        assert names[0] and names[0] != names[1]
        assert remove_left_semaphores(runs[0]) == 0  # they are at work
        for process in groups:
            os.killpg(process.pid, signal.SIGKILL)  # with the tracker that would clean up
            process.wait()
        assert remove_left_semaphores(runs[0]) == 3
        assert not (SHARED_MEMORY / f"sem.{names[0]}").exists()
        assert (SHARED_MEMORY / f"sem.{names[1]}").exists()
        assert remove_left_semaphores(runs[0]) == 0
    finally:
        for process in groups:
            process.kill()
            process.wait()
        for run in runs:
            remove_left_semaphores(run)


def test_names_of_others_stay(tmp_path: Path) -> None:
    for name in ("sem.mp-abcdefgh", "sem.mp-0123456789ab-1-1-1-x", "sem.other", "nccl-abc"):
        (tmp_path / name).touch()
    assert remove_left_semaphores(tmp_path, tmp_path) == 0
    assert remove_left_semaphores(tmp_path, tmp_path / "none") == 0
    assert len(list(tmp_path.iterdir())) == 4
