"""CPU time: of a contender's process, of those it started, of DALI's threads in it; and of whole cores."""

import multiprocessing
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")  # of the kernel's accounting, per second


@dataclass(frozen=True)
class Usage:
    """CPU seconds, of user and system together, since each process or thread began.

    workers: processes started by this one. threads: DALI's threads in this process. rest: of this process.
    """

    workers: float
    threads: float
    rest: float

    def __sub__(self, earlier: "Usage") -> "Usage":
        return Usage(self.workers - earlier.workers, self.threads - earlier.threads, self.rest - earlier.rest)


def usage() -> Usage:
    """What this process and those it started have used so far; those that have ended do not count."""
    own = _seconds(Path("/proc/self/stat"))
    threads = sum(
        _seconds(thread / "stat")
        for thread in Path("/proc/self/task").iterdir()
        if (thread / "comm").read_text().startswith("[DALI]")
    )
    workers = sum(_seconds(Path(f"/proc/{child.pid}/stat")) for child in multiprocessing.active_children())
    return Usage(workers, threads, own - threads)


def busy_seconds(cores: Collection[int]) -> float:
    """CPU seconds that these cores have been at work since the machine started, whoever for."""
    names = {f"cpu{core}" for core in cores}
    ticks = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name in names:
            user, nice, system, _, _, interrupts, soft_interrupts, *_ = map(int, fields)
            ticks += user + nice + system + interrupts + soft_interrupts
    return ticks / TICKS


def _seconds(stat: Path) -> float:
    # The second field, the name in brackets, may hold spaces; user and system time are fields 14 and 15.
    after_name = stat.read_text().rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / TICKS
