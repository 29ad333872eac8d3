"""The commit that the program is of."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from trainer.system import git as module
from trainer.system.git import git_state


def test_the_state_of_a_source_tree(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert git_state(tmp_path) is None
    git("init", "--initial-branch", "topic")
    assert git_state(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    clean = git_state(tmp_path)
    assert clean is not None
    assert (clean.commit, clean.branch, clean.dirty) == (git("rev-parse", "HEAD"), "topic", False)
    (tmp_path / "file").write_text("2")
    changed = git_state(tmp_path)
    assert changed is not None and changed.dirty
    (tmp_path / ".venv").mkdir()
    assert git_state(tmp_path / ".venv") is None  # a wheel in it is no part of this project


def test_a_git_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does that waits for a dead file server: it cannot be killed."""
    fake = tmp_path / "git"
    fake.write_text("#!/bin/sh\nexec sleep 5\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(module, "_TIMEOUT", 0.2)
    begun = time.monotonic()
    assert git_state() is None
    assert time.monotonic() - begun < 4
