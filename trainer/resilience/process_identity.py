"""Identity of processes on this machine: process numbers are reused, so start times are compared too."""

import os
import time
from pathlib import Path


def boot_id() -> str:
    """The boot of this machine's kernel, the same in all its containers; empty where that is unknown."""
    return _read("/proc/sys/kernel/random/boot_id")


def pid_namespace() -> str:
    """The namespace of this process's number; containers have their own. Empty where unknown."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def start_ticks(pid: int) -> int | None:
    """Start of a process in clock ticks since boot; None for a zombie, or without such a process."""
    fields = _status(pid)
    # The 3rd field is the state, the 22nd the start.
    if len(fields) < 20 or fields[0] in "ZX":
        return None
    return int(fields[19])


def process_age() -> float:
    """Seconds since this process was started; importing libraries takes up to a minute."""
    started = (start_ticks(os.getpid()) or 0) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def parent(pid: int) -> int | None:
    """The parent of a process; None where there is no such process."""
    fields = _status(pid)
    return int(fields[1]) if len(fields) > 1 else None


def is_hidden(pid: int) -> bool:
    """Whether a process of this number exists that this user may not inspect."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return not Path(f"/proc/{pid}/stat").exists()
    except (ProcessLookupError, OverflowError):
        return False
    return False


def _status(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the 3rd on; the 2nd, the name in brackets, may contain blanks."""
    return _read(f"/proc/{pid}/stat").rpartition(")")[2].split()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
