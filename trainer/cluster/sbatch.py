"""The script of a SLURM job: a head with the request, and the body that all jobs share."""

import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import RunError
from trainer.secrets import redacted
from trainer.system.slurm import parse_time_limit

LAUNCH = Path(__file__).parents[2] / "launch"
TEMPLATE = LAUNCH / "slurm" / "train.sbatch"
"""The script for users who write their own head; its body is that of all scripts."""

_BODY = "# ---- from here on the same in every job ----\n"


@dataclass(frozen=True)
class JobRequest:
    """What is asked of SLURM. Raises RunError, naming the option, for a value that no cluster accepts."""

    name: str
    nodes: int
    gpus_per_node: int
    """a rank each; with 0, one rank per node computes on its CPU"""
    cpus_per_rank: int
    """cores for a rank and its workers"""
    time: str
    """limit of an attempt, as SLURM writes it: `24:00:00` or `2-12:00:00`"""
    lead: int
    """seconds before the limit at which SLURM signals the run to leave"""
    container: Path | None = None
    """Apptainer image to run in"""
    options: tuple[str, ...] = ()
    """more options of sbatch, such as `--partition=gpu`"""
    requeues: bool = True
    """whether an unfinished job is requeued"""
    preflight: bool = True
    at_once: int | None = None
    """most tasks of an array that run at a time"""
    min_bandwidth: float | None = None
    """GB/s that the preflight requires of the all-reduce"""

    def __post_init__(self) -> None:
        for option, least in (("nodes", 1), ("gpus-per-node", 0), ("cpus-per-rank", 1)):
            if (value := getattr(self, option.replace("-", "_"))) < least:
                raise RunError(f"--{option} {value}: at least {least}")
        if parse_time_limit(self.time) <= self.lead:
            raise RunError(f"--time {self.time} is not longer than --lead {self.lead}, the seconds to save")
        if self.at_once is not None and self.at_once < 1:
            raise RunError(f"--array {self.at_once}: at least 1")
        for option in self.options:
            if re.search(r"\s", option):
                raise RunError(f"--sbatch {option!r}: no blanks; give each option by itself: --sbatch=--x=y")
        if self.container is not None and not self.container.is_file():
            raise RunError(f"--container {self.container}: there is no such image")

    @property
    def ranks_per_node(self) -> int:
        return max(1, self.gpus_per_node)

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


def format_script(request: JobRequest, tasks: Sequence[Sequence[str]], log: Path, made_by: str) -> str:
    """The text of a job's script.

    Args:
        request: for SLURM.
        tasks: arguments of launch/train.py; several make an array with a task for each.
        log: of the script's output, with SLURM's `%j`, or `%A_%a`, in its name.
        made_by: the command that wrote the script, for a comment.

    Raises RunError for a folder with blanks, an argument of several lines, and a container that would not
    find the project.
    """
    if re.search(r"\s", str(log)):
        raise RunError(f"{log.parent.parent}: SLURM accepts no blanks in the name of a run directory")
    if any("\n" in argument for task in tasks for argument in task):
        raise RunError("an argument has several lines, which a job's script cannot hold")
    # A password in tracking.uri reaches the job through its environment, see `set_job_credentials`.
    tasks = [[redacted(argument) for argument in task] for task in tasks]
    made_by = redacted(made_by)
    body = TEMPLATE.read_text(encoding="utf-8").partition(_BODY)
    return f"{_head(request, tasks, log, made_by)}\n{_BODY}{body[2]}"


def _head(request: JobRequest, tasks: Sequence[Sequence[str]], log: Path, made_by: str) -> str:
    at_once = f"%{request.at_once}" if request.at_once else ""
    options = [
        f"--job-name={request.name}", f"--nodes={request.nodes}",
        f"--ntasks-per-node={request.ranks_per_node}", f"--cpus-per-task={request.cpus_per_rank}",
        *([f"--gpus-per-node={request.gpus_per_node}"] if request.gpus_per_node else []),
        f"--time={request.time}", f"--signal=B:USR1@{request.lead}",
        "--requeue" if request.requeues else "--no-requeue", "--open-mode=append", f"--output={log}",
        *([f"--array=0-{len(tasks) - 1}{at_once}"] if len(tasks) > 1 else []), *request.options,
    ]  # fmt: skip
    lines = ["#!/bin/bash", f"# Written by: {made_by}", *(f"#SBATCH {option}" for option in options), ""]
    lines += ["# The Python that all nodes run.", f"python=({shlex.join(python_command(request))})"]
    lines += ["# The folder of the commands.", f"launch={shlex.quote(launch_folder(request))}"]
    demands = ["--gpus-per-node", str(request.gpus_per_node)]
    if request.min_bandwidth is not None:
        demands += ["--min-bandwidth", f"{request.min_bandwidth:g}"]
    lines += ["# Requirements for the preflight.", f"demands=({shlex.join(demands)})"]
    if not request.requeues:
        chain = f"export CHAINED=yes SUBMITTED={time.time():.0f}"
        lines += ["# The next job of the chain continues where this one ends.", chain]
    if not request.preflight:
        lines += ["PREFLIGHT=no"]
    lines += ["", "# The training."]
    commands = [f"set -- {shlex.join(task)}" for task in tasks]
    if len(tasks) == 1:
        return "\n".join([*lines, *commands, ""])
    cases = [f"  {number}) {command} ;;" for number, command in enumerate(commands)]
    return "\n".join([*lines, "case $SLURM_ARRAY_TASK_ID in", *cases, "esac", ""])


def launch_folder(request: JobRequest) -> str:
    """The folder of the commands: below the folder that the job starts in, else that of this program."""
    if Path("launch/slurm/turn.py").exists():
        return "launch"
    if request.container is not None:
        raise RunError("--container: give the command in the project's folder, whose code the container runs")
    return str(LAUNCH)


def python_command(request: JobRequest) -> list[str]:
    """The Python that all nodes run, in the container if there is one, which gets the GPUs of the request."""
    if request.container is None:
        return [sys.executable]
    here = str(Path.cwd())
    options = [
        *(["--nv"] if request.gpus_per_node else []),
        "--bind",
        here,
        "--pwd",
        here,
    ]
    return ["apptainer", "exec", *options, str(request.container.absolute()), "python"]
