"""CPU time of this process, of its child processes, and of whole cores."""

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
    """CPU seconds, user and system, since each process started."""

    workers: float
    """Of the running child processes."""
    own: float
    """Of this process with all its threads."""

    def __sub__(self, earlier: "CpuUsage") -> "CpuUsage":
        return CpuUsage(self.workers - earlier.workers, self.own - earlier.own)


def read_cpu_usage() -> CpuUsage:
    """CPU time so far of this process and its running child processes; ended ones do not count."""
    workers = sum(read_process_seconds(child.pid) for child in multiprocessing.active_children() if child.pid)
    return CpuUsage(workers, time.process_time())


def read_process_seconds(pid: int) -> float:
    """CPU time of a process with all its threads; 0 for one that has ended."""
    clock = ctypes.c_int()
    # The clock behind time.process_time, for another process: nanoseconds, where /proc counts ticks.
    if LIBC.clock_getcpuclockid(pid, ctypes.byref(clock)) != 0:
        return 0.0
    try:
        return time.clock_gettime(clock.value)
    except OSError:  # the process ended meanwhile
        return 0.0


def read_busy_seconds(cores: Collection[int], stat_file: Path = Path("/proc/stat")) -> float:
    """CPU seconds that these cores were busy since the machine started, with any process.

    stat_file: the kernel's counters, in the format of /proc/stat.
    """
    names = {f"cpu{core}" for core in cores}
    ticks = 0
    for line in stat_file.read_text(encoding="utf-8").splitlines():
        name, *fields = line.split()
        if name in names:
            user, nice, system, _, _, interrupts, soft_interrupts, *_ = map(int, fields)
            ticks += user + nice + system + interrupts + soft_interrupts
    return ticks / TICKS
