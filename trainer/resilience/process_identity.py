"""Processes of this machine, by marks that a number alone does not have: numbers are given again."""

import os
from pathlib import Path


def boot_id() -> str:
    """The boot of this machine's kernel, the same in all its containers; empty where that is unknown."""
    return _read("/proc/sys/kernel/random/boot_id")


def pid_namespace() -> str:
    """Within which a process has its number; containers have their own. Empty where it is unknown."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def start_ticks(pid: int) -> int | None:
    """When a living process of this namespace began, in clock ticks since boot.

    None where there is none of that number, or it has ended and only waits to be noticed.
    """
    fields = _status(pid)
    # The 3rd field is the state, the 22nd the start.
    if len(fields) < 20 or fields[0] in "ZX":
        return None
    return int(fields[19])


def parent(pid: int) -> int | None:
    """The process that started one, or that has taken it over; None where it is gone."""
    fields = _status(pid)
    return int(fields[1]) if len(fields) > 1 else None


def is_hidden(pid: int) -> bool:
    """Whether there is a process of this number about which this user may not learn more."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return not Path(f"/proc/{pid}/stat").exists()
    except (ProcessLookupError, OverflowError):
        return False
    return False


def _status(pid: int) -> list[str]:
    """Its fields in /proc from the 3rd on; the 2nd, the name in brackets, may hold blanks."""
    return _read(f"/proc/{pid}/stat").rpartition(")")[2].split()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
