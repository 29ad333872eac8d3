"""SLURM's commands and the meaning of their output."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.errors import RunError

TIMEOUT = 60.0  # seconds for a command; a busy controller is slow, a dead one never answers

_FIELDS = {"id": "%i", "nodes": "%N", "reason": "%r", "state": "%T"}  # the last one is never empty

# `90`, `90:00`, `1:30:00`, `2-12`, `2-12:00`, `2-12:00:00`: minutes[:seconds], hours:.., days-hours[:..]
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")

PENDING_REASONS = {
    "Resources": "all suitable nodes are in use",
    "Priority": "other jobs come first",
    "BeginTime": "its begin time has not come; a requeued job waits for two minutes",
    "Dependency": "another job has to end first",
    "DependencyNeverSatisfied": "the job it depends on ended in another way: it will never start",
    "ReqNodeNotAvail": "a node it needs is down or reserved; `sinfo -R` prints why",
    "PartitionNodeLimit": "it asks for more nodes than its partition allows: it will never start",
    "PartitionTimeLimit": "it asks for more time than its partition allows: it will never start",
    "PartitionConfig": "its partition does not allow what it asks for: it will never start",
    "BadConstraints": "no node has what it asks for: it will never start",
    "JobHeldUser": "held by its user; `scontrol release` releases it",
    "JobHeldAdmin": "held by an administrator",
    "None": "SLURM has not scheduled it yet",
    "QOS": "a limit of its QOS",
    "Assoc": "a limit of its account",
    "MaxJobs": "a limit on the number of jobs",
}
"""By SLURM's reason, or by its beginning, in plain words."""


@dataclass(frozen=True)
class QueuedJob:
    """A job in SLURM's queue."""

    id: str
    """`12`, or `12_3` for a task of an array"""
    state: str
    """such as PENDING or RUNNING"""
    reason: str
    """why it waits, as SLURM names it, such as Resources; `None` while it runs"""
    nodes: str
    """a node list such as `n[1-2]`, empty while it waits"""

    @property
    def why(self) -> str:
        """Why the job waits, in plain words with SLURM's reason."""
        if self.state != "PENDING":
            return f"SLURM's state is {self.state}"
        word = self.reason.partition(",")[0].strip("() ")
        known = PENDING_REASONS.get(word) or next(
            (text for prefix, text in PENDING_REASONS.items() if word.startswith(prefix)), None
        )
        return self.reason if known is None else f"{known} ({self.reason})"


def is_available() -> bool:
    """Whether SLURM's commands are on this machine."""
    return shutil.which("squeue") is not None


def run_command(*command: str) -> str:
    """The standard output of one of SLURM's commands.

    Raises RunError with SLURM's own message where it refuses, is not installed, or does not answer.
    """
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except FileNotFoundError as error:
        message = f"{command[0]} is not on this machine: give the command on a login node of the cluster"
        raise RunError(message) from error
    except subprocess.TimeoutExpired as error:
        message = f"{command[0]} did not answer within {TIMEOUT:.0f} s; `scontrol ping` checks the controller"
        raise RunError(message) from error
    if result.returncode != 0:
        lines = [_without_prefix(line) for line in result.stderr.splitlines() if line.strip()]
        raise RunError(f"{command[0]} refuses: {'; '.join(lines) or f'exit code {result.returncode}'}")
    return result.stdout.strip()


def queue(jobs: Sequence[str]) -> list[QueuedJob]:
    """Those of some jobs that are in the queue, by number; a job that ended is not. Raises RunError.

    squeue's own order puts jobs that wait before those that run.
    """
    lines = _squeue(jobs, "--array", f"--format={chr(9).join(_FIELDS.values())}").splitlines() if jobs else []
    found = [QueuedJob(**dict(zip(_FIELDS, line.split("\t"), strict=True))) for line in lines]
    return sorted(found, key=lambda job: [int(number) for number in re.findall(r"\d+", job.id)])


def job_states(job: str) -> list[str]:
    """A job's state, such as RUNNING; empty where SLURM has forgotten the job. Raises RunError.

    job: such as `12`, or `12_3` for a task of an array. The number of a whole array, or of a heterogeneous
    job, gives the state of each of its parts.
    """
    return _squeue([job], "--states=all", "--format=%T").split()


def job_steps(job: str) -> set[str]:
    """The steps of a running job: their numbers, and names such as `batch`. Raises RunError.

    squeue prints them with the job: `12.0`, in an array `12_3.0`, in a heterogeneous job `12+0.0`, `12.0+1`.
    """
    steps = run_command("squeue", "--noheader", "--steps", "--format=%i", f"--jobs={job}").split()
    return {step.rpartition(".")[2].partition("+")[0].lower() for step in steps if "." in step}


def _squeue(jobs: Sequence[str], *options: str) -> str:
    """Empty for a single job that SLURM has forgotten."""
    try:
        return run_command("squeue", "--noheader", *options, f"--jobs={','.join(jobs)}")
    except RunError as error:
        if "Invalid job id" in str(error):
            return ""
        raise


def _without_prefix(line: str) -> str:
    for prefix in ("error: ", "fatal: "):
        line = line.partition(prefix)[2] or line
    return line.strip()


def partitions() -> list[str]:
    """The names of the partitions. Raises RunError."""
    return sorted({name.rstrip("*") for name in run_command("sinfo", "--noheader", "--format=%P").split()})


def find_nodes(*options: str) -> tuple[set[str], set[str]]:
    """The nodes that are up, and those that are down. options: of sinfo. Raises RunError."""
    up: set[str] = set()
    down: set[str] = set()
    for line in run_command("sinfo", "--noheader", "--Node", "--format=%N %t", *options).splitlines():
        node, state = line.split()
        # A star marks a node that does not answer.
        (down if state.startswith(("down", "drain", "fail", "drng")) or state.endswith("*") else up).add(node)
    return up, down - up


def parse_time_limit(text: str) -> int:
    """A time limit of SLURM in seconds. Raises RunError for another format."""
    match = _TIME.fullmatch(text)
    if match is None:
        raise RunError(f"--time {text}: not a time; write 90 (minutes), 1:30:00 or 2-12:00:00 (days-hours)")
    parts = [int(part) for part in match["parts"].split(":")]
    if match["days"] is not None:  # hours[:minutes[:seconds]]
        parts += [0] * (3 - len(parts))
    elif len(parts) == 1:  # minutes
        parts += [0]
    hours, minutes, rest = [0] * (3 - len(parts)) + parts
    return ((int(match["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + rest
