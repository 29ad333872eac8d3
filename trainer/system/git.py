"""The commit of the program."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

from trainer.system.timeouts import run_with_timeout

_SOURCE = Path(__file__).parents[1]
_COMMAND_TIMEOUT = 10.0  # seconds for a git command
_TIMEOUT = 25.0  # seconds for all: a command that waits for a dead file server cannot be killed


@dataclass(frozen=True)
class GitState:
    """The commit of a source tree."""

    commit: str
    branch: str
    """`(detached)` without a branch."""
    dirty: bool
    """Whether tracked files differ from the commit."""


def git_state(folder: Path = _SOURCE) -> GitState | None:
    """None outside a repository, before the first commit, after a timeout, or if git tracks no file of the
    folder: a wheel may be installed inside another project.
    """
    try:
        return run_with_timeout(_TIMEOUT, lambda: _state(folder), "git")
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
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]  # git writes nothing
    return subprocess.run(
        command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT, check=True
    ).stdout
