"""Tags and note of a run."""

import subprocess
import sys
from pathlib import Path

import pytest

from trainer.tracking.run_description import RunDescription, git_state


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


@pytest.mark.parametrize(
    ("launcher", "begins"),
    [
        ("alone", "python launch/train.py --recipe"),
        ("deepspeed", "deepspeed --num_gpus 4 launch/train.py --recipe"),
        ("torchrun", "torchrun --nnodes 2 --nproc_per_node 4 launch/train.py"),
        ("srun", "sbatch "),
    ],
)
def test_the_note_says_what_by_which_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: str, begins: str
) -> None:
    uri = "tracking.uri=http://user:s3cretpw@host"
    arguments = ["launch/train.py", "--local_rank=0", "--recipe", "r.yaml", "--set", uri]
    monkeypatch.setattr(sys, "argv", arguments)
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "20260101-000000.sbatch").touch()
    described = RunDescription(
        recipe="k400",
        model="b16 scene",
        data=[("training", "data/a|b.arrow", 240_000, 400)],
        run_dir=tmp_path,
        launcher=launcher,
        ranks=8,
        nodes=2,
        device="NVIDIA H100",
        starts=3,
    )
    tags = described.tags({"SLURM_JOB_ID": "12"})
    note = tags["mlflow.note.content"]
    assert f"\n{begins}" in note
    assert "--local_rank" not in note and "s3cretpw" not in note
    assert "| training | `data/a\\|b.arrow` | 240,000 | 400 |" in note
    assert (tags["mlflow.source.type"], tags["slurm_job"], tags["starts"]) == ("JOB", "12", "3")
    assert tags["mlflow.user"]
