"""Semaphores that a killed run leaves in /dev/shm.

Python's multiprocessing makes named semaphores for the queues of worker processes. It unlinks them when the
process ends, and its resource tracker does where the process was killed, unless the tracker was killed, too,
as a scheduler or a container runtime kills all processes of a job. Their names begin with a prefix that is in
a process's configuration; here it gets the run's mark, and the process that made them.
"""

import hashlib
import multiprocessing.process
import os
import re
from pathlib import Path

from trainer.resilience.process_identity import pid_namespace, start_ticks

SHARED_MEMORY = Path("/dev/shm")

_OWNER = re.compile(r"sem\.mp-[0-9a-f]{12}-(\d+)-(\d+)-(\d+)-.+")


def mark_semaphores(run_dir: Path) -> None:
    """Give the semaphores that this process and its children make from now on the run's mark."""
    pid = os.getpid()
    prefix = f"/mp-{_mark(run_dir)}-{pid}-{start_ticks(pid) or 0}-{_namespace()}"
    # Not public, but the only way there is; where it is gone, semaphores are named as ever.
    configuration = getattr(multiprocessing.process.current_process(), "_config", None)
    if isinstance(configuration, dict) and "semprefix" in configuration:
        configuration["semprefix"] = prefix


def remove_left_semaphores(run_dir: Path, shared_memory: Path = SHARED_MEMORY) -> int:
    """Remove what killed processes of this run left on this node; returns how many there were.

    Only what bears the run's mark, belongs to this user, and was made by a process that this one could see
    and that is gone.
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
        try:
            if path.lstat().st_uid == os.geteuid():
                path.unlink()
                removed += 1
        except OSError:
            continue
    return removed


def _mark(run_dir: Path) -> str:
    return hashlib.sha256(os.fsencode(run_dir.resolve())).hexdigest()[:12]


def _namespace() -> int:
    """Number of the namespace that process numbers belong to; 0 where it is unknown."""
    match = re.search(r"\d+", pid_namespace())
    return int(match[0]) if match else 0
