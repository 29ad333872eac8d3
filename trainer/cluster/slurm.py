"""SLURM's commands: what is asked of them, and what they say when they refuse."""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.errors import RunError

ANSWER_WITHIN = 60.0  # seconds; a controller under load takes its time, one that is gone takes for ever

_FIELDS = {"id": "%i", "state": "%T", "reason": "%r", "nodes": "%N", "time_left": "%L", "name": "%j"}


@dataclass(frozen=True)
class QueuedJob:
    """A job in SLURM's queue.

    id: as SLURM shows it, `12` or `12_3` for a task of an array. state: such as PENDING, RUNNING. reason: why
    it waits, in SLURM's word, such as Resources; `None` while it runs. nodes: a node list such as `n[1-2]`,
    empty while it waits. time_left: until its time limit, such as `1-02:03:04`. name: of the job.
    """

    id: str
    state: str
    reason: str
    nodes: str
    time_left: str
    name: str


def is_available() -> bool:
    """Whether this machine can ask a SLURM."""
    return shutil.which("squeue") is not None


def run_command(*command: str, given: str | None = None) -> str:
    """What one of SLURM's commands prints; given: on its standard input.

    Raises RunError with SLURM's own words where it refuses, is not there, or does not answer.
    """
    try:
        result = subprocess.run(command, input=given, capture_output=True, text=True, timeout=ANSWER_WITHIN)
    except FileNotFoundError as error:
        raise RunError(
            f"{command[0]} is not on this machine: give the command on a login node of the cluster"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise RunError(
            f"{command[0]} has not answered for {ANSWER_WITHIN:.0f} s: SLURM's controller may be down; "
            "`scontrol ping` tells"
        ) from error
    if result.returncode != 0:
        raise RunError(f"{command[0]} refuses: {_words(result.stderr) or f'exit code {result.returncode}'}")
    return result.stdout.strip()


def queue(jobs: Sequence[str]) -> list[QueuedJob]:
    """Those of some jobs that are in the queue, by any user; what has ended is not. Raises RunError."""
    if not jobs:
        return []
    form = "\t".join(_FIELDS.values())
    chosen = f"--jobs={','.join(jobs)}"
    try:
        lines = run_command("squeue", "--noheader", "--array", f"--format={form}", chosen).splitlines()
    except RunError as error:
        if "Invalid job id" in str(error):  # a single one that SLURM has forgotten
            return []
        raise
    return [QueuedJob(**dict(zip(_FIELDS, line.split("\t"), strict=True))) for line in lines]


def partitions() -> list[str]:
    """Names of the partitions there are. Raises RunError."""
    return sorted(
        {name.rstrip("*") for name in run_command("sinfo", "--noheader", "--format=%P").splitlines()}
    )


def _words(text: str) -> str:
    """Its complaint on one line, without the command's name before each."""
    return "; ".join(_unprefixed(line) for line in text.splitlines() if line.strip())


def _unprefixed(line: str) -> str:
    for before in ("error: ", "fatal: "):
        line = line.partition(before)[2] or line
    return line.strip()


def job_states(job: str) -> list[str]:
    """A job's state, such as RUNNING; empty where SLURM does not know the job any more. Raises RunError.

    job: such as `12`, or `12_3` for a task of an array. The number of a whole array, or of a heterogeneous
    job, gives the state of each of its parts.
    """
    try:
        return run_command("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}").split()
    except RunError as error:
        if "Invalid job id" in str(error):
            return []
        raise


def job_steps(job: str) -> set[str]:
    """The steps of a running job: their numbers, and names such as `batch`. Raises RunError.

    Without the job, which squeue shows in several forms: `12.0`, `12_3.0` in an array, `12+0.0` or `12.0+1`
    in a heterogeneous job.
    """
    steps = run_command("squeue", "--noheader", "--steps", "--format=%i", f"--jobs={job}").split()
    return {step.rpartition(".")[2].partition("+")[0].lower() for step in steps if "." in step}
