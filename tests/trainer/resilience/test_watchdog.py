"""Real processes that hang in earnest; each is one rank of a run."""

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.resilience.signals import REQUEUE

RANK = """
import ctypes, os, signal, sys, time
from pathlib import Path
from trainer.resilience.watchdog import Watchdog

{before}
with Watchdog(
    Path({folder!r}), rank={rank}, world_size={ranks}, limit={limit}, grace={grace}
) as watchdog:
    watchdog.beat("step 7")
    {body}
"""

MEETING = """
import torch.distributed as dist
from trainer.distributed.collectives import run_on_all_ranks
dist.init_process_group("gloo", init_method="file://{folder}/meeting", rank={rank}, world_size=2)
"""


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen]]:
    """Processes that are ended with the test, whatever state they are in."""
    processes: list[subprocess.Popen] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate(timeout=60)


def start(
    folder: Path,
    body: str,
    *,
    before: str = "",
    rank: int = 0,
    ranks: int = 1,
    limit: float | None = 3.0,
    grace: float = 2.0,
) -> subprocess.Popen:
    """A rank that does `before`, and then `body` under a watchdog; limit and grace in seconds."""
    program = RANK.format(
        folder=str(folder), before=before, body=body, rank=rank, ranks=ranks, limit=limit, grace=grace
    )
    command = [sys.executable, "-c", program]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_rank_that_hangs_says_where_and_ends(tmp_path: Path, started: list[subprocess.Popen]) -> None:
    process = start(tmp_path, "stuck()", before="def stuck(): time.sleep(1000)")
    started.append(process)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == REQUEUE
    assert re.search(r"rank 0 is at \S+:\d+ stuck\. ", errors), errors
    report = (tmp_path / "hangs/rank-00000.txt").read_text()
    assert re.search(r"last sign of progress: step 7, [3-9] s ago", report), report
    assert "innermost of this program: none" in report
    assert "in _watch" in report, "the stacks of the other threads"
    assert (tmp_path / "hangs/summary.txt").read_text().strip() in errors


def test_a_call_that_keeps_the_global_lock_ends_too(tmp_path: Path, started: list[subprocess.Popen]) -> None:
    process = start(tmp_path, "stuck()", before="def stuck(): ctypes.PyDLL(None).sleep(1000)")
    started.append(process)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Timeout" in errors
    assert " in stuck\n" in errors


def test_two_ranks_of_which_one_is_stopped(tmp_path: Path, started: list[subprocess.Popen]) -> None:
    bodies = "run_on_all_ranks(lambda: None)", "os.kill(os.getpid(), signal.SIGSTOP)"
    for rank, body in enumerate(bodies):
        before = MEETING.format(folder=tmp_path, rank=rank)
        started.append(start(tmp_path, body, before=before, rank=rank, ranks=2, limit=6.0))
    _, errors = started[0].communicate(timeout=120)
    assert started[0].returncode == REQUEUE, errors
    assert "rank 0 waits in all_gather (trainer/distributed/collectives.py:" in errors
    assert "rank 1 has written nothing" in errors


@pytest.mark.soak
def test_equal_places_are_told_as_one_and_old_files_are_not_told(
    tmp_path: Path, started: list[subprocess.Popen]
) -> None:
    old = tmp_path / "hangs/rank-00000.txt"
    old.parent.mkdir()
    old.write_text("at an earlier place\n")
    os.utime(old, (time.time() - 60, time.time() - 60))
    asleep = "time.sleep(1000)"
    started += [start(tmp_path, asleep, rank=rank, ranks=6, grace=6.0) for rank in (1, 2, 4)]
    errors = [process.communicate(timeout=60)[1] for process in started]
    assert [process.returncode for process in started] == [REQUEUE] * 3
    assert "ranks 1-2, 4 are at" in errors[0]
    assert "ranks 0, 3, 5 have written nothing" in errors[0]
    assert "earlier" not in errors[0]
    assert errors[1:] == ["", ""], "one rank tells"


def test_what_cannot_be_written_is_said(tmp_path: Path, started: list[subprocess.Popen]) -> None:
    (tmp_path / "hangs").touch()  # a file stands where the folder should be
    process = start(tmp_path, "time.sleep(1000)")
    started.append(process)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == REQUEUE
    assert "rank 0 hangs at" in errors
    assert "cannot be written" in errors


def test_progress_is_no_hang(tmp_path: Path, started: list[subprocess.Popen]) -> None:
    body = """
    for step in range(50):
        watchdog.beat(f"step {step}")
        time.sleep(0.1)
    """
    process = start(tmp_path, body)
    started.append(process)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert not (tmp_path / "hangs").exists()


def test_a_machine_that_was_suspended_is_no_hang(tmp_path: Path, started: list[subprocess.Popen]) -> None:
    body = """
    print("ready", flush=True)
    sys.stdin.readline()
    time.sleep(0.5)
    """
    process = start(tmp_path, body)
    started.append(process)
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], 60)[0], "it never came"
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(5)
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate("\n", timeout=60)
    assert (process.returncode, errors) == (0, "")


def test_without_a_limit_nothing_is_watched(tmp_path: Path, started: list[subprocess.Popen]) -> None:
    process = start(tmp_path, "import threading; print(threading.active_count())", limit=None)
    started.append(process)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (0, "1\n", "")


def test_a_rank_that_was_only_slow_goes_on(tmp_path: Path, started: list[subprocess.Popen]) -> None:
    """It comes back while the ranks still gather what to tell."""
    body = 'time.sleep(3); watchdog.beat("step 8"); print("went on", flush=True)'
    process = start(tmp_path, body, limit=1.0, grace=20.0)
    started.append(process)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert out.strip() == "went on"
    assert (tmp_path / "hangs/rank-00000.txt").exists() and not (tmp_path / "hangs/summary.txt").exists()
