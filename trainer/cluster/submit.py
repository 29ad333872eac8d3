"""From recipes to jobs in SLURM's queue: checked first, so that a mistake shows now and not after a night."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from trainer.cluster.run_status import PENDING_REASONS
from trainer.cluster.sbatch import JobRequest, format_script, parse_time_limit
from trainer.cluster.slurm import partitions, queue, run_command
from trainer.cluster.sweep import Variant
from trainer.engine.batch_split import split_batch
from trainer.errors import RunError
from trainer.system.files import append_lines, parse_records, write_text
from trainer.system.secrets import set_job_credentials
from trainer.tracking.mlflow_tracker import MlflowTracker, check_tracking, find_mlflow_run_id

_LOOKS = 4  # at a new job, a second apart
_LATEST = 100  # jobs of a run that are looked for in the queue; a chain may be long
_MLFLOW_PATIENCE = 60.0  # seconds that a submission waits for MLflow to take the run above a sweep's


@dataclass(frozen=True)
class Submission:
    """What is to be submitted.

    home: the run's folder, or the sweep's. runs: the folder of each variant's run. text: of the script.
    """

    request: JobRequest
    home: Path
    runs: tuple[Path, ...]
    path: Path
    log: Path
    text: str


def plan_submission(
    request: JobRequest,
    chosen: Sequence[Variant],
    *,
    home: Path,
    extra: Sequence[str],
    made_by: str,
    parent: str | None = None,
) -> Submission:
    """What would be submitted; nothing is written.

    home: folder of the one variant's run, or of the sweep, in which each has its own. extra: more arguments
    of launch/train.py. parent: MLflow's id of the run that a sweep's runs stand under.

    Raises RunError or RecipeError where a batch cannot be divided over the ranks, and as `format_script`.
    """
    for variant in chosen:
        recipe, limit = variant.recipe, variant.recipe.engine.micro_batch
        tracking = recipe.tracking
        if tracking.enabled:
            check_tracking(home, uri=tracking.uri, experiment=tracking.experiment)
            set_job_credentials(tracking.uri)
        split_batch(
            recipe.optimisation.global_batch,
            request.ranks,
            limit if isinstance(limit, int) else None,
            recipe.sampling.repeats,
        )
        manifests = [*(part.manifest for part in recipe.data.train_manifests), recipe.data.val]
        absent = [str(path) for path in manifests if not path.exists()]
        if absent and recipe.data.embedded is None:
            raise RunError(f"no manifest at {', '.join(absent)}; make it with uniformerv2 prepare first")
    is_sweep = len(chosen) > 1
    runs = tuple(home / variant.label if is_sweep else home for variant in chosen)
    tasks = []
    for variant, run_dir in zip(chosen, runs, strict=True):
        settings = [*variant.overrides, *([f"name={variant.label}"] if is_sweep else [])]
        settings += [f"tracking.parent_run={parent}"] if parent else []
        task = ["--recipe", str(variant.path), "--run-dir", str(run_dir)]
        tasks.append([*task, *(part for text in settings for part in ("--set", text)), *extra])
    log = home / "slurm" / ("job-%A_%a.log" if is_sweep else "job-%j.log")
    path = home / "slurm" / f"{time.strftime('%Y%m%d-%H%M%S')}.sbatch"
    return Submission(request, home, runs, path, log, format_script(request, tasks, log, made_by))


def create_parent_run(home: Path, chosen: Sequence[Variant]) -> str | None:
    """Make the MLflow run that a sweep's runs stand under; returns its id, None where they are not tracked.

    A sweep that is submitted again keeps its own. Raises RunError when MLflow cannot be reached.
    """
    tracking = chosen[0].recipe.tracking
    if not tracking.enabled:
        return None
    home.mkdir(parents=True, exist_ok=True)
    tracker = MlflowTracker(home, uri=tracking.uri, experiment=tracking.experiment, run_name=home.name)
    varied: dict[str, dict[str, None]] = {}  # of each field the values, in their order
    for variant in chosen:
        for field, value in variant.values:
            varied.setdefault(field, {})[value] = None
    tracker.record_params(
        {"sweep": len(chosen), **{field: ", ".join(values) for field, values in varied.items()}}
    )
    tracker.close("FINISHED", _MLFLOW_PATIENCE)
    found = find_mlflow_run_id(home)
    if found is None:
        raise RunError(
            "MLflow cannot be reached, and a sweep's runs stand under one run there: mend that "
            "(tracking.uri, MLFLOW_TRACKING_URI), or give --set tracking.enabled=false"
        )
    return found


def submit(submission: Submission, *, after: str | None, count: int = 1) -> list[str]:
    """Write the script and hand it to SLURM, so many times, each waiting for the one before to end.

    after: a job that has to end first, in whichever way. Returns SLURM's numbers. Raises RunError, also where
    the run has a job already: two would write into one folder.
    """
    _refuse_second(submission, after)
    folder = submission.path.parent
    folder.mkdir(parents=True, exist_ok=True)
    write_text(submission.path, submission.text)
    jobs: list[str] = []
    for _ in range(count):
        before = jobs[-1] if jobs else after
        waits = [f"--dependency=afterany:{before}"] if before else []
        jobs.append(_sbatch([*waits, str(submission.path)], submission.request.gpus_per_node))
        if len(jobs) == 1:
            _refuse_hopeless(jobs[0])
        for number, run_dir in enumerate(submission.runs):
            job = f"{jobs[-1]}_{number}" if len(submission.runs) > 1 else jobs[-1]
            log = _log_of(submission, jobs[-1], number)
            (run_dir / "slurm").mkdir(parents=True, exist_ok=True)
            append_lines(
                run_dir / "slurm" / "jobs.jsonl",
                [
                    {
                        "job": job,
                        "time": round(time.time(), 3),
                        "nodes": submission.request.nodes,
                        "script": str(submission.path.absolute()),
                        "log": str(log.absolute()),
                    }
                ],
            )
    return jobs


def format_submission(submission: Submission, jobs: Sequence[str]) -> str:
    """What was submitted, where its logs go, and what to do next."""
    request, is_sweep = submission.request, len(submission.runs) > 1
    runs = f"{len(submission.runs)} runs, each of " if is_sweep else ""
    limit = timedelta(seconds=parse_time_limit(request.time))
    size = f"{request.nodes} node{'s' if request.nodes > 1 else ''} x {request.ranks_per_node} ranks"
    return "\n".join(
        (
            f"job {', '.join(jobs)} submitted: {runs}{size}, {limit} a turn",
            f"script  {submission.path}",
            *(f"log     {_log_of(submission, job, '*')}" for job in jobs),
            f"ranks   {submission.home}/{'*/' if is_sweep else ''}logs/job-*/rank-*.log",
            f"watch   uniformerv2 status {submission.home}",
            f"stop    scancel {' '.join(jobs)}",
        )
    )


def find_missing_nodes(request: JobRequest) -> str | None:
    """Why the job will have to wait, where fewer nodes are up than it asks for. Raises RunError."""
    chosen = [option for option in request.options if option.startswith("--partition=")]
    up: set[str] = set()
    down: set[str] = set()
    for line in run_command("sinfo", "--noheader", "--Node", "--format=%N %t", *chosen).splitlines():
        node, state = line.split()
        # A star marks a node that does not answer.
        (down if state.startswith(("down", "drain", "fail", "drng")) or state.endswith("*") else up).add(node)
    if len(up) >= request.nodes:
        return None
    named = ", ".join(sorted(down - up)[:8])
    return (
        f"{request.nodes} nodes are asked for, and {len(up)} are up{f' (not: {named})' if named else ''}: "
        "the job waits until the others come back. `sinfo -R` says why they are away"
    )


def _refuse_second(submission: Submission, after: str | None) -> None:
    known: dict[str, Path] = {}
    for run_dir in submission.runs:
        path = run_dir / "slurm" / "jobs.jsonl"
        if path.exists():
            latest = [line["job"] for line in parse_records(path.read_text(encoding="utf-8"))][-_LATEST:]
            known.update(dict.fromkeys(latest, run_dir))
    waiting = [job.id for job in queue(sorted(known)) if job.id in known and job.id != after]
    if waiting:
        raise RunError(
            f"{known[waiting[0]]} has a job already: {', '.join(waiting)}. Cancel it with scancel, or go on "
            f"after it with --after {waiting[-1]}"
        )


def _log_of(submission: Submission, job: str, task: int | str) -> Path:
    """Where the script of a job, or of an array's task, says what it does."""
    name = submission.log.name.replace("%A", job).replace("%j", job).replace("%a", str(task))
    return submission.log.with_name(name)


def _sbatch(arguments: Sequence[str], gpus_per_node: int) -> str:
    try:
        return run_command("sbatch", "--parsable", *arguments).partition(";")[0]
    except RunError as error:
        said = str(error)
        if "partition" in said:
            raise RunError(f"{said}. There are: {', '.join(partitions())}") from error
        if "gres" in said.lower():
            raise RunError(
                f"{said}. No node there has {gpus_per_node} GPUs: set --gpus-per-node; 0 computes on CPUs"
            ) from error
        raise


def _refuse_hopeless(job: str) -> None:
    """Take back a job of which SLURM says that it will never start; it looks at it within seconds, mostly."""
    for _ in range(_LOOKS):
        reasons = {queued.reason for queued in queue([job]) if queued.state == "PENDING"}
        hopeless = [
            words for reason in reasons if "never start" in (words := PENDING_REASONS.get(reason, ""))
        ]
        if hopeless:
            run_command("scancel", job)
            raise RunError(
                f"job {job} was taken back: {hopeless[0]}. `scontrol show partition` says what may be"
            )
        if reasons != {"None"}:
            return
        time.sleep(1.0)
