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
class CpuUsage:
    """CPU seconds, of user and system together, since each process began.

    workers: processes started by this one. own: this process, with all its threads.
    """

    workers: float
    own: float

    def __sub__(self, earlier: "CpuUsage") -> "CpuUsage":
        return CpuUsage(self.workers - earlier.workers, self.own - earlier.own)


def read_cpu_usage() -> CpuUsage:
    """What this process and those it started have used so far; those that have ended do not count."""
    workers = sum(read_process_seconds(child.pid) for child in multiprocessing.active_children() if child.pid)
    return CpuUsage(workers, time.process_time())


def read_process_seconds(pid: int) -> float:
    """CPU time that a process has used, with all its threads; one that has ended counts nothing."""
    clock = ctypes.c_int()
    # The clock that time.process_time reads of the own process. To the nanosecond, where /proc has ticks.
    if LIBC.clock_getcpuclockid(pid, ctypes.byref(clock)) != 0:
        return 0.0
    try:
        return time.clock_gettime(clock.value)
    except OSError:  # it has ended since
        return 0.0


def read_busy_seconds(cores: Collection[int], stat_file: Path = Path("/proc/stat")) -> float:
    """CPU seconds that these cores have been at work since the machine started, whoever for.

    accounts: where the kernel keeps them.
    """
    names = {f"cpu{core}" for core in cores}
    ticks = 0
    for line in stat_file.read_text(encoding="utf-8").splitlines():
        name, *fields = line.split()
        if name in names:
            user, nice, system, _, _, interrupts, soft_interrupts, *_ = map(int, fields)
            ticks += user + nice + system + interrupts + soft_interrupts
    return ticks / TICKS
