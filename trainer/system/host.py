"""What this machine has."""

import os
from dataclasses import dataclass
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class SharedMemory:
    """The file system in which processes share memory; in bytes.

    device: tells apart those of several containers on one machine.
    """

    total: int
    free: int
    device: int

    @classmethod
    def read(cls, folder: Path = SHARED_MEMORY) -> "SharedMemory | None":
        """What it is now; None where there is none, or it has no limit."""
        try:
            figures = os.statvfs(folder)
            device = os.stat(folder).st_dev
        except OSError:
            return None
        if figures.f_blocks == 0:
            return None
        return cls(figures.f_blocks * figures.f_frsize, figures.f_bavail * figures.f_frsize, device)
