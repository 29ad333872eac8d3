"""Chains submitted to SLURM: which job each stage waits for. Scripts stand in for SLURM's commands."""

import json
import os
from pathlib import Path

import pytest

from tests.trainer.cluster.test_sbatch import request
from trainer.cluster.submit import Submission, queued_jobs
from trainer.cluster.submit_chain import submit_chain
from trainer.errors import RunError


class Slurm:
    """Jobs in a file, which the scripts read and write; `calls` has what changed the queue."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._lines = folder, folder / "queue"
        self._lines.touch()
        (folder / "calls").touch()
        number = f"$((100 + $(wc -l < {folder}/calls)))"
        self._write("squeue", f"cat {self._lines}")
        self._write(
            "sbatch",
            f"echo sbatch ${{2%%*.sbatch}} >> {folder}/calls; n={number}\n"
            f"printf '%s\\t\\tDependency\\tPENDING\\n' $n >> {self._lines}; echo $n",
        )
        removed = 'echo "Invalid job id specified" >&2; exit 1'
        self._write("scontrol", f"case $2 in {{removed}}) {removed};; esac\necho $2 $3 >> {folder}/calls")

    def _write(self, name: str, script: str) -> None:
        (self.folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.folder / name).chmod(0o755)

    def has(self, *jobs: str) -> None:
        """Such as `11 PENDING`, in the order in which squeue prints them."""
        lines = [job.split() for job in jobs]
        self._lines.write_text("".join(f"{number}\t\tDependency\t{state}\n" for number, state in lines))

    def removes(self, job: str) -> None:
        script = self.folder / "scontrol"
        script.write_text(script.read_text().replace("{removed}", f"JobId={job}"))

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return Slurm(tmp_path / "bin")


def stage(home: Path, *jobs: str) -> Submission:
    """A planned stage whose run directory names these jobs."""
    (home / "slurm").mkdir(parents=True)
    lines = [json.dumps({"job": job, "time": float(time)}) + "\n" for time, job in enumerate(jobs)]
    (home / "slurm" / "jobs.jsonl").write_text("".join(lines))
    return Submission(
        request(), home, (home,), home / "slurm/x.sbatch", home / "slurm/job-%j.log", "#!/bin/sh\n"
    )


def test_jobs_are_in_the_order_of_their_numbers(tmp_path: Path, slurm: Slurm) -> None:
    home = stage(tmp_path / "a", "9", "10", "101_2", "11").home
    slurm.has("101_2 PENDING", "11 PENDING", "10 PENDING", "8 RUNNING", "9 RUNNING")
    assert [job.id for job in queued_jobs(home)] == ["9", "10", "11", "101_2"]


def test_a_new_stage_waits_for_the_last_job_of_the_stage_before(tmp_path: Path, slurm: Slurm) -> None:
    slurm.has("10 PENDING", "9 RUNNING")
    lines: list[str] = []
    submit_chain(
        [stage(tmp_path / "a", "9", "10"), stage(tmp_path / "b"), stage(tmp_path / "c")], lines.append
    )
    assert lines[0] == f"{tmp_path / 'a'}: job 10 is in the queue already"
    assert slurm.calls == ["sbatch --dependency=afterok:10", "sbatch --dependency=afterok:101"]


def test_a_stage_that_waits_is_put_behind_the_job_that_continues_the_one_before(
    tmp_path: Path, slurm: Slurm
) -> None:
    slurm.has("11 PENDING", "12 PENDING", "13 PENDING", "9 RUNNING")
    submit_chain([stage(tmp_path / "a", "9", "13"), stage(tmp_path / "b", "11", "12"), stage(tmp_path / "c")])
    # Job 12 waits for 11 already.
    assert slurm.calls == ["JobId=11 Dependency=afterok:13", "sbatch --dependency=afterok:12"]


def test_queued_stages_are_put_behind_a_new_job(tmp_path: Path, slurm: Slurm) -> None:
    slurm.has("11 PENDING", "12 PENDING")
    slurm.removes("11")
    submit_chain([stage(tmp_path / "a"), stage(tmp_path / "b", "11", "12")])
    # SLURM has removed 11 meanwhile, so that nothing holds 12 back.
    assert slurm.calls == ["sbatch", "JobId=12 Dependency=afterok:101"]


def test_a_stage_that_runs_keeps_its_jobs(tmp_path: Path, slurm: Slurm) -> None:
    slurm.has("12 PENDING", "9 RUNNING", "11 RUNNING")
    submit_chain([stage(tmp_path / "a", "9"), stage(tmp_path / "b", "11", "12")])
    assert slurm.calls == []
    with pytest.raises(RunError, match="has job 11, RUNNING, but"):
        submit_chain([stage(tmp_path / "c"), stage(tmp_path / "d", "11", "12")])
    assert slurm.calls == []
