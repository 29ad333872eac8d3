"""Resources of this machine."""

import os
from dataclasses import dataclass
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class SharedMemory:
    """The file system for shared memory, in bytes; `device` differs between containers of a machine."""

    total: int
    free: int
    device: int

    @classmethod
    def read(cls, folder: Path = SHARED_MEMORY) -> "SharedMemory | None":
        """Its present state; None without one, or without a limit."""
        try:
            figures = os.statvfs(folder)
            device = os.stat(folder).st_dev
        except OSError:
            return None
        if figures.f_blocks == 0:
            return None
        return cls(figures.f_blocks * figures.f_frsize, figures.f_bavail * figures.f_frsize, device)
