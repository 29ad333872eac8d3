"""The commit that the program is of."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

from trainer.system.timeouts import run_with_timeout

_SOURCE = Path(__file__).parents[1]
_PATIENCE = 10.0  # seconds for a git command
_LONGEST = 25.0  # seconds for all: one that waits for a dead file server cannot be killed


@dataclass(frozen=True)
class GitState:
    """The commit of a source tree."""

    commit: str
    branch: str
    """`(detached)` where there is none."""
    dirty: bool
    """Whether files differ from the commit; files that git does not know do not count."""


def git_state(folder: Path = _SOURCE) -> GitState | None:
    """None outside of git, before the first commit, and where git does not answer in time; and where a
    repository has no file of the folder: a wheel may be installed in a folder of somebody's project.
    """
    try:
        return run_with_timeout(_LONGEST, lambda: _state(folder), "git")
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):  # TimeoutError is an OSError
        return None


def _state(folder: Path) -> GitState | None:
    lines = _git(folder, "status", "--porcelain=v2", "--branch", "--untracked-files=no").splitlines()
    heads = [line[2:].partition(" ") for line in lines if line.startswith("# branch.")]
    head = {name: value for name, _, value in heads}
    commit = head.get("branch.oid", "(initial)")
    if commit == "(initial)" or not _git(folder, "ls-files"):
        return None
    return GitState(commit, head.get("branch.head", ""), any(not line.startswith("#") for line in lines))


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]  # it writes nothing
    return subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=True).stdout
