"""A manifest made by SLURM: an array with a task for each part, and a job that merges them."""

import argparse
import re
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipelines.dataset.prepare.parts import MOST_PARTS
from pipelines.dataset.prepare.probe_log import WHOLE
from trainer.cluster.job_options import job_request
from trainer.cluster.sbatch import JobRequest, launch_folder, python_command
from trainer.cluster.submit import check_can_start, sbatch, wait_options
from trainer.errors import RunError
from trainer.secrets import redacted
from trainer.system.files import write_text

_LEAD = 60  # seconds before the time limit at which SLURM signals a part; a part continues from any moment


@dataclass(frozen=True)
class PartsSubmission:
    """A checked submission."""

    parts: int
    folder: Path
    """of scripts and logs: `<out>.slurm`"""
    array: str
    """the text of the script of all parts"""
    merge: str
    """the text of the script that merges them"""

    def preview(self, after: str | None = None) -> str:
        """Both scripts. after: the job that the parts wait for."""
        first = " ".join(wait_options(after, only_after_success=False))
        waits = " ".join(wait_options("JOB1", only_after_success=True))
        parts = f"# ---- the parts, with {first} ----\n" if first else ""
        return f"{parts}{self.array}\n# ---- after all parts, with {waits} ----\n{self.merge}"


def submit_manifest(
    args: argparse.Namespace, parse: Callable[[list[str]], argparse.Namespace], made_by: str
) -> None:
    """Submit the parts of a manifest, or print the scripts, by the options of launch/slurm/submit.py.

    Args:
        args: its options.
        parse: parses the arguments of launch/prepare.py.
        made_by: as for `plan_parts`.

    Raises RunError or DataError for options and arguments that cannot work.
    """
    if not 1 <= args.parts <= MOST_PARTS or args.recipe:
        raise RunError(f"--parts {args.parts}: 1 to {MOST_PARTS:,}, without --recipe")
    job = parse(args.training)
    if "list_videos" not in job or job.part != WHOLE:
        raise RunError("--parts: expected a job that makes a manifest, without --part: -- folder VIDEOS ...")
    request = job_request(args, f"prepare-{job.out.stem}", at_once=args.array)
    planned = plan_parts(request, args.parts, args.training, job.out, made_by)
    if args.dry_run:
        print(planned.preview(args.after), end="")
    else:
        print(format_parts(planned, submit_parts(planned, after=args.after)))


def plan_parts(
    request: JobRequest, parts: int, command: Sequence[str], out: Path, made_by: str
) -> PartsSubmission:
    """Format the scripts; nothing is written.

    Args:
        request: its nodes and GPUs do not count: a part takes `cpus_per_rank` cores of one node.
        parts: how many there are.
        command: the arguments of launch/prepare.py, checked, without `--part`.
        out: the manifest that they make.
        made_by: the command that wrote the scripts, for a comment.

    Raises RunError for a folder with blanks, and an argument of several lines.
    """
    folder = out.with_name(f"{out.name}.slurm")
    if re.search(r"\s", str(folder.absolute())):
        raise RunError(f"{folder}: SLURM accepts no blanks in the name of a folder")
    if any("\n" in argument for argument in command):
        raise RunError("an argument has several lines, which a job's script cannot hold")
    has_workers = any(each.startswith("--w") for each in command)
    workers = [] if has_workers else ["--workers", str(request.cpus_per_rank)]
    prepare = [*python_command(replace(request, gpus_per_node=0)), f"{launch_folder(request)}/prepare.py"]
    at_once = f"%{request.at_once}" if request.at_once else ""
    array = _script(
        request, made_by, f"{request.name}-parts", folder / "part-%A_%a.log", [f"--array=1-{parts}{at_once}"],
        f'{shlex.join([*prepare, *command, *workers])} --part "$SLURM_ARRAY_TASK_ID/{parts}"',
    )  # fmt: skip
    merge = _script(
        request, made_by, f"{request.name}-merge", folder / "merge-%j.log", [],
        shlex.join([*prepare, "merge", str(out)]),
    )  # fmt: skip
    return PartsSubmission(parts, folder, array, merge)


def submit_parts(planned: PartsSubmission, *, after: str | None) -> tuple[str, str]:
    """Write the scripts and submit them. Returns SLURM's numbers of the array and of the merging job.

    after: a job that has to end first, in any way. Raises RunError.
    """
    planned.folder.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    array, merge = (planned.folder / f"{stamp}-{name}.sbatch" for name in ("parts", "merge"))
    write_text(array, planned.array)
    write_text(merge, planned.merge)
    first = sbatch([*wait_options(after, only_after_success=False), str(array)], gpus_per_node=0)
    check_can_start(first)
    waits = wait_options(first, only_after_success=True)
    return first, sbatch([*waits, str(merge)], gpus_per_node=0)


def format_parts(planned: PartsSubmission, jobs: tuple[str, str]) -> str:
    """What was submitted, where the logs are, and the next commands."""
    array, merge = jobs
    return "\n".join(
        (
            f"job {array} submitted: {planned.parts} parts; then job {merge} merges them",
            f"logs    {planned.folder}/part-{array}_*.log, {planned.folder}/merge-{merge}.log",
            f"stop    scancel {array} {merge}",
            "If a part fails or reaches its time limit, give this command again: it continues.",
        )
    )


def _script(
    request: JobRequest, made_by: str, name: str, log: Path, options: Sequence[str], command: str
) -> str:
    head = [
        f"--job-name={name}", "--nodes=1", "--ntasks=1", f"--cpus-per-task={request.cpus_per_rank}",
        f"--time={request.time}", f"--signal=B:TERM@{_LEAD}", "--requeue", "--open-mode=append",
        f"--output={log.absolute()}", *options, *request.options,
    ]  # fmt: skip
    lines = ["#!/bin/bash", f"# Written by: {redacted(made_by)}", *(f"#SBATCH {option}" for option in head)]
    return "\n".join([*lines, "", "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}", f"exec {command}", ""])
