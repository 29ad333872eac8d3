"""Submits a chain: a job for each stage, which starts when that of the stage before has succeeded."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from trainer.cluster.submit import Submission, format_submission, preview, queued_jobs, submit
from trainer.errors import RunError
from trainer.system.slurm import QueuedJob, run_command


@dataclass(frozen=True)
class _StageJobs:
    """A stage that is not finished, and its jobs that SLURM has already, by number: each continues the one
    before."""

    submission: Submission
    queued: list[QueuedJob]

    @property
    def last(self) -> str:
        """The job that the next stage waits for."""
        return self.queued[-1].id


def submit_chain(planned: Sequence[Submission], print_line: Callable[[str], None] = print) -> None:
    """Submit a job for each stage that has none in the queue; the others keep theirs.

    The first job of a stage that waits is made to wait for the last one of the stage before: a new one, where
    the job it was submitted after has ended, or one that continues it.

    planned: the stages that are not finished, in order. Raises RunError, before a job is submitted where a
    stage has a job that does not wait although one before it has none.
    """
    stages = [_StageJobs(submission, queued_jobs(submission.home)) for submission in planned]
    _check_order(stages)
    before: str | None = None
    for stage in stages:
        if stage.queued and _is_in_order(stage.queued, before):
            print_line(f"{stage.submission.home}: job {stage.last} is in the queue already")
            before = stage.last
            continue
        (before,) = submit(stage.submission, after=before, only_after_success=True)
        print_line(format_submission(stage.submission, [before]))


def preview_chain(planned: Sequence[Submission]) -> Iterator[str]:
    """The scripts with the commands that submit them, if no stage has a job yet; `JOB_OF_` and the name of a
    stage stands for the number of its job."""
    before: str | None = None
    for submission in planned:
        yield preview(submission, after=before, only_after_success=True)
        before = f"JOB_OF_{submission.request.name}"


def _check_order(stages: Sequence[_StageJobs]) -> None:
    missing: Submission | None = None
    for stage in stages:
        begun = [job for job in stage.queued if job.state != "PENDING"]
        if missing is not None and begun:
            raise RunError(
                f"{stage.submission.home} has job {begun[0].id}, {begun[0].state}, but {missing.home}, from "
                f"which it starts, is not finished and has no job. `scancel {begun[0].id}`, then the same "
                "command again"
            )
        missing = missing or (None if stage.queued else stage.submission)


def _is_in_order(queued: Sequence[QueuedJob], before: str | None) -> bool:
    """Let the first of a stage's jobs that SLURM still has wait for `before`, unless one has begun.

    The others wait for that one. False where SLURM has removed them all meanwhile.
    """
    if before is None or any(job.state != "PENDING" for job in queued):
        return True
    return any(_waits_for(job.id, before) for job in queued)


def _waits_for(job: str, before: str) -> bool:
    """Let a pending job wait for another one. False where SLURM has removed it meanwhile."""
    try:
        run_command("scontrol", "update", f"JobId={job}", f"Dependency=afterok:{before}")
    except RunError as error:
        if "Invalid job id" in str(error):
            return False
        raise
    return True
