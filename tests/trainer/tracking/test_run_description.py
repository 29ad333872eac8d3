"""Tags and note of a run."""

import sys
from pathlib import Path

import pytest

from trainer.tracking.run_description import RunDescription


@pytest.mark.parametrize(
    ("launcher", "begins"),
    [
        ("alone", "python launch/train.py --recipe"),
        ("deepspeed", "deepspeed --num_gpus 4 launch/train.py --recipe"),
        ("torchrun", "torchrun --nnodes 2 --nproc_per_node 4 launch/train.py"),
        ("srun", "sbatch "),
    ],
)
def test_the_note_has_the_command_and_the_data(
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
