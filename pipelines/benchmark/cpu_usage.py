"""CPU time: of a contender's process, of those it started; and of whole cores."""

import ctypes
import multiprocessing
import os
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")  # of the kernel's accounting, per second
LIBC = ctypes.CDLL(None)


@dataclass(frozen=True)
class Usage:
    """CPU seconds, of user and system together, since each process began.

    workers: processes started by this one. own: this process, with all its threads.
    """

    workers: float
    own: float

    def __sub__(self, earlier: "Usage") -> "Usage":
        return Usage(self.workers - earlier.workers, self.own - earlier.own)


def usage() -> Usage:
    """What this process and those it started have used so far; those that have ended do not count."""
    workers = sum(process_seconds(child.pid) for child in multiprocessing.active_children() if child.pid)
    return Usage(workers, time.process_time())


def process_seconds(pid: int) -> float:
    """CPU time that a process has used, with all its threads; one that has ended counts nothing."""
    clock = ctypes.c_int()
    # The clock that time.process_time reads of the own process. To the nanosecond, where /proc has ticks.
    if LIBC.clock_getcpuclockid(pid, ctypes.byref(clock)) != 0:
        return 0.0
    try:
        return time.clock_gettime(clock.value)
    except OSError:  # it has ended since
        return 0.0


def busy_seconds(cores: Collection[int], accounts: Path = Path("/proc/stat")) -> float:
    """CPU seconds that these cores have been at work since the machine started, whoever for.

    accounts: where the kernel keeps them.
    """
    names = {f"cpu{core}" for core in cores}
    ticks = 0
    for line in accounts.read_text(encoding="utf-8").splitlines():
        name, *fields = line.split()
        if name in names:
            user, nice, system, _, _, interrupts, soft_interrupts, *_ = map(int, fields)
            ticks += user + nice + system + interrupts + soft_interrupts
    return ticks / TICKS
