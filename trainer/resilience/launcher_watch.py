"""Whether this rank's launcher is alive: without it, nothing ends the rank of a lost run."""

import os
from pathlib import Path

from trainer.resilience.process_identity import parent, start_ticks

_OWN_PROCESS = {"deepspeed", "torchrun", "mpi"}  # launchers that live as long as their ranks


class LauncherWatch:
    """Watches the parent process and, with the deepspeed launcher, the parent's parent.

    launcher: as in `Environment`. Other launchers are not watched: srun's daemon ends its ranks, and a shell
    may end before its child.
    """

    def __init__(self, launcher: str) -> None:
        self._watched: list[tuple[int, int]] = []
        if launcher not in _OWN_PROCESS:
            return
        self._watch(os.getppid())
        if launcher == "deepspeed" and self._watched:
            # One process per node starts the ranks. Its parent is the command on a single node only.
            above = parent(self._watched[0][0])
            if above is not None and _is_deepspeed(above):
                self._watch(above)

    def is_gone(self) -> bool:
        return any(start_ticks(number) != start for number, start in self._watched)

    def _watch(self, number: int) -> None:
        start = start_ticks(number)
        if number > 1 and start is not None:
            self._watched.append((number, start))


def _is_deepspeed(number: int) -> bool:
    """Whether a process is the `deepspeed` command, not a shell with a script of that name."""
    try:
        words = Path(f"/proc/{number}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    # A script is started as `python .../bin/deepspeed ...`.
    is_python = Path(words[0]).name.startswith("python")
    return is_python and any(Path(word).name == "deepspeed" for word in words[1:4])
