"""Removal of semaphores that killed runs left in /dev/shm.

Python's multiprocessing creates named semaphores for the queues of worker processes. They remain if the
process and its resource tracker are killed, as a scheduler kills all processes of a job. Their names begin
with a configurable prefix, which here identifies the run and the process.
"""

import hashlib
import multiprocessing.process
import os
import re
from contextlib import suppress
from pathlib import Path

from trainer.resilience.process_identity import pid_namespace, start_ticks

SHARED_MEMORY = Path("/dev/shm")

_OWNER = re.compile(r"sem\.mp-[0-9a-f]{12}-(\d+)-(\d+)-(\d+)-.+")


def mark_semaphores(run_dir: Path) -> None:
    """Name the later semaphores of this process and its children after the run and the process."""
    pid = os.getpid()
    prefix = f"/mp-{_mark(run_dir)}-{pid}-{start_ticks(pid) or 0}-{_namespace()}"
    # A private attribute; without it, semaphores keep their default names.
    configuration = getattr(multiprocessing.process.current_process(), "_config", None)
    if isinstance(configuration, dict) and "semprefix" in configuration:
        configuration["semprefix"] = prefix


def remove_left_semaphores(run_dir: Path, shared_memory: Path = SHARED_MEMORY) -> int:
    """Remove semaphores of this run, this user and this process namespace whose process is gone.

    Returns their number.
    """
    removed = 0
    try:
        left = list(shared_memory.glob(f"sem.mp-{_mark(run_dir)}-*"))
    except OSError:
        return 0
    for path in left:
        match = _OWNER.fullmatch(path.name)
        if match is None or int(match[3]) != _namespace() or start_ticks(int(match[1])) == int(match[2]):
            continue
        with suppress(OSError):
            if path.lstat().st_uid == os.geteuid():
                path.unlink()
                removed += 1
    return removed


def _mark(run_dir: Path) -> str:
    return hashlib.sha256(os.fsencode(run_dir.resolve())).hexdigest()[:12]


def _namespace() -> int:
    """Number of the process namespace; 0 where unknown."""
    match = re.search(r"\d+", pid_namespace())
    return int(match[0]) if match else 0
