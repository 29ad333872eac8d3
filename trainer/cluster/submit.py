"""From recipes to jobs in SLURM's queue. Everything is checked first, so that a mistake shows at once."""

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from trainer.cluster.run_status import read_job_lines
from trainer.cluster.sbatch import JobRequest, format_script
from trainer.config.variants import Variant
from trainer.engine.batch_split import split_batch
from trainer.errors import RunError
from trainer.secrets import set_job_credentials
from trainer.system.files import append_lines, write_text
from trainer.system.slurm import (
    PENDING_REASONS,
    QueuedJob,
    find_nodes,
    parse_time_limit,
    partitions,
    queue,
    run_command,
)

_POLLS = 4  # of a new job, a second apart
_LATEST = 200  # lines about jobs of a run that are looked up in the queue; a chain may be long


@dataclass(frozen=True)
class Submission:
    """A checked submission."""

    request: JobRequest
    home: Path
    """the run directory, or the folder of the sweep"""
    runs: tuple[Path, ...]
    """the run directory of each variant"""
    path: Path
    log: Path
    """of the script's output, with SLURM's `%j`, or `%A_%a`, in its name"""
    text: str


def plan_submission(
    request: JobRequest,
    chosen: Sequence[Variant],
    *,
    home: Path,
    made_by: str,
    extra: Sequence[str] = (),
    parent: str | None = None,
    needs_data: bool = True,
) -> Submission:
    """Check a submission and format its script; nothing is written.

    Args:
        request, made_by: as for `format_script`.
        chosen: the variants.
        home: run directory of the only variant, or the folder of a sweep, in which each variant has its own.
        extra: more arguments of launch/train.py.
        parent: id of the MLflow run that is the parent of a sweep's.
        needs_data: whether a missing manifest is an error; a script that is only printed needs none.

    Raises RunError or RecipeError where a batch cannot be divided over the ranks or a manifest is missing.
    """
    for variant in chosen:
        recipe, limit = variant.recipe, variant.recipe.engine.micro_batch
        if recipe.tracking.enabled:
            set_job_credentials(recipe.tracking.uri)
        most = limit if isinstance(limit, int) else None
        split_batch(recipe.optimisation.global_batch, request.ranks, most, recipe.clip_group)
        absent = {str(path): None for _, path in recipe.data.manifest_fields if not path.exists()}
        if needs_data and absent and recipe.data.embedded is None:
            raise RunError(f"no manifest at {', '.join(absent)}; make it with uniformerv2 prepare first")
    is_sweep = len(chosen) > 1
    runs = tuple(home / variant.label if is_sweep else home for variant in chosen)
    tasks = []
    for variant, run_dir in zip(chosen, runs, strict=True):
        settings = list(variant.overrides)
        if is_sweep:
            settings = [text for text in settings if text.partition("=")[0].strip() != "name"]
            settings.append(f"name={variant.label}")
        settings += [f"tracking.parent_run={parent}"] if parent else []
        task = ["--recipe", str(variant.path), "--run-dir", str(run_dir)]
        tasks.append([*task, *(part for text in settings for part in ("--set", text)), *extra])
    log = home / "slurm" / ("job-%A_%a.log" if is_sweep else "job-%j.log")
    path = home / "slurm" / f"{time.strftime('%Y%m%d-%H%M%S')}.sbatch"
    return Submission(request, home, runs, path, log, format_script(request, tasks, log, made_by))


def submit(
    submission: Submission, *, after: str | None, count: int = 1, only_after_success: bool = False
) -> list[str]:
    """Write the script and submit it `count` times, each job waiting for the end of the one before.

    after: a job that has to end first, in any way, or with `only_after_success` with exit code 0: SLURM
    removes the new job if that one fails. Returns SLURM's numbers. Raises RunError, also where a run
    has a job already: both would write into one run directory.
    """
    _check_no_job(submission, after)
    submission.path.parent.mkdir(parents=True, exist_ok=True)
    write_text(submission.path, submission.text)
    jobs: list[str] = []
    for _ in range(count):
        before = jobs[-1] if jobs else after
        waits = wait_options(before, only_after_success=only_after_success)
        jobs.append(sbatch([*waits, str(submission.path)], submission.request.gpus_per_node))
        if len(jobs) == 1:
            check_can_start(jobs[0])
        for number, run_dir in enumerate(submission.runs):
            record = {
                "job": f"{jobs[-1]}_{number}" if len(submission.runs) > 1 else jobs[-1],
                "time": round(time.time(), 3),
                "nodes": submission.request.nodes,
                "script": str(submission.path.absolute()),
                "log": str(_log_of(submission, jobs[-1], number).absolute()),
            }
            (run_dir / "slurm").mkdir(parents=True, exist_ok=True)
            append_lines(run_dir / "slurm" / "jobs.jsonl", [record])
    return jobs


def wait_options(before: str | None, *, only_after_success: bool) -> list[str]:
    """The options of sbatch for a job that waits for another one to end, see `submit`."""
    if not before:
        return []
    if only_after_success:
        return [f"--dependency=afterok:{before}", "--kill-on-invalid-dep=yes"]
    return [f"--dependency=afterany:{before}"]


def preview(
    submission: Submission, *, after: str | None = None, count: int = 1, only_after_success: bool = False
) -> str:
    """The script, then the commands of `submit` as comments, in which JOB1 is the number of the first job."""
    lines, before = [submission.text.rstrip("\n")], after
    for number in range(1, count + 1):
        options = wait_options(before, only_after_success=only_after_success)
        command = shlex.join(["sbatch", *options, str(submission.path)])
        lines.append(f"# submitted with: {command}")
        before = f"JOB{number}"
    return "\n".join(lines)


def format_submission(submission: Submission, jobs: Sequence[str]) -> str:
    """What was submitted, where the logs are, and the next commands."""
    request, is_sweep = submission.request, len(submission.runs) > 1
    runs = f"{len(submission.runs)} runs, each of " if is_sweep else ""
    limit = timedelta(seconds=parse_time_limit(request.time))
    size = f"{request.nodes} node{'s' if request.nodes > 1 else ''} x {request.ranks_per_node} ranks"
    return "\n".join(
        (
            f"job {', '.join(jobs)} submitted: {runs}{size}, {limit} per attempt",
            f"script  {submission.path}",
            *(f"log     {_log_of(submission, job, '*')}" for job in jobs),
            f"ranks   {submission.home}/{'*/' if is_sweep else ''}logs/job-*/rank-*.log",
            f"watch   uniformerv2 status {submission.home}",
            f"stop    scancel {' '.join(jobs)}",
        )
    )


def find_missing_nodes(request: JobRequest) -> str | None:
    """Why the job will have to wait, where fewer nodes are up than it asks for. Raises RunError."""
    up, down = find_nodes(*(option for option in request.options if option.startswith("--partition=")))
    if len(up) >= request.nodes:
        return None
    named = ", ".join(sorted(down)[:8])
    return (
        f"{request.nodes} nodes are asked for, and {len(up)} are up{f' (not: {named})' if named else ''}: "
        "the job waits until the others are back. `sinfo -R` prints why they are down"
    )


def queued_jobs(run_dir: Path) -> list[QueuedJob]:
    """A run's jobs that are in SLURM's queue, by number. Raises RunError where SLURM does not answer."""
    known = {line["job"] for line in read_job_lines(run_dir)[-_LATEST:]}
    return [job for job in queue(sorted(known)) if job.id in known]


def _check_no_job(submission: Submission, after: str | None) -> None:
    known = {line["job"]: path for path in submission.runs for line in read_job_lines(path)[-_LATEST:]}
    waiting = [job.id for job in queue(sorted(known)) if job.id in known and job.id != after]
    if waiting:
        raise RunError(
            f"{known[waiting[0]]} has a job already: {', '.join(waiting)}. Wait for its end, cancel it with "
            f"scancel, or continue after it with `uniformerv2 submit --after {waiting[-1]}`"
        )


def _log_of(submission: Submission, job: str, task: int | str) -> Path:
    """The log of a job's script, or of the script of an array's task."""
    name = submission.log.name.replace("%A", job).replace("%j", job).replace("%a", str(task))
    return submission.log.with_name(name)


def sbatch(arguments: Sequence[str], gpus_per_node: int) -> str:
    """The number of the new job."""
    try:
        return run_command("sbatch", "--parsable", *arguments).partition(";")[0]
    except RunError as error:
        message = str(error)
        if "partition" in message:
            raise RunError(f"{message}. Partitions: {', '.join(partitions())}") from error
        if "gres" in message.lower():
            advice = f"No node there has {gpus_per_node} GPUs: set --gpus-per-node; 0 computes on CPUs"
            raise RunError(f"{message}. {advice}") from error
        raise


def check_can_start(job: str) -> None:
    """Cancel a job that SLURM will never start, and raise RunError; SLURM knows within seconds, mostly."""
    for _ in range(_POLLS):
        reasons = {queued.reason for queued in queue([job]) if queued.state == "PENDING"}
        texts = [PENDING_REASONS.get(reason, "") for reason in reasons]
        if hopeless := [text for text in texts if "never start" in text]:
            run_command("scancel", job)
            limits = "`scontrol show partition` prints the limits"
            raise RunError(f"job {job} was cancelled: {hopeless[0]}. {limits}")
        if reasons != {"None"}:
            return
        time.sleep(1.0)
