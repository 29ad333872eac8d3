"""`bench.py scale`: clips per second of 1, 2 and 4 ranks with the same micro-batch on each.

On a CPU, each rank has one core, and ranks beyond the cores share them; gloo adds up the gradients.
"""

import argparse
import os
import tempfile
from statistics import median
from typing import Any

from models.config import PRESETS
from pipelines.arguments import integer
from pipelines.formatting import format_count
from trainer.benchmark.arguments import add_common, add_device, add_timeout, resolve_device
from trainer.benchmark.child import run_children
from trainer.benchmark.report import BenchmarkReport, ResultTable, interference
from trainer.errors import RunError
from trainer.monitoring.progress import show_progress

HELP = "clips per second of several ranks, and their efficiency"


def add_arguments(job: argparse.ArgumentParser) -> None:
    job.add_argument(
        "--ranks", type=integer(1, 64), action="append", help="number of ranks; repeatable (1, 2, 4)"
    )
    job.add_argument("--preset", choices=tuple(PRESETS), default="tiny", help="model to train (%(default)s)")
    job.add_argument("--frames", type=integer(1), default=8, help="frames of a clip (%(default)s)")
    job.add_argument("--batch", type=integer(1), default=8, help="clips of a rank (%(default)s)")
    job.add_argument(
        "--steps", type=integer(1), default=20, help="steps to measure in each round (%(default)s)"
    )
    job.add_argument("--repeats", type=integer(1), default=3, help="number of rounds (%(default)s)")
    add_device(job)
    add_timeout(job)
    add_common(job, "scale")


def run(args: argparse.Namespace, report: BenchmarkReport) -> None:
    """Measures the numbers of ranks in rounds. Raises RunError for more ranks than GPUs."""
    device = resolve_device(args.device)
    cores = sorted(os.sched_getaffinity(0))
    counts = sorted(set(args.ranks or (1, 2, 4)))
    if device == "cuda":
        import torch

        gpus = torch.cuda.device_count()
        if args.ranks and counts[-1] > gpus:
            raise RunError(f"--ranks {counts[-1]}: there are {gpus} GPUs")
        counts = [count for count in counts if count <= gpus]
    places = len(cores) if device == "cpu" else counts[-1]
    total, done = args.repeats * len(counts), 0
    args.out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="scale-", dir=args.out.absolute()) as folder,
        show_progress("measuring ranks") as progress,
    ):
        progress(0, total)
        for repeat in range(args.repeats):
            first = repeat % len(counts)
            for count in (*counts[first:], *counts[:first]):
                tasks = [
                    {
                        "preset": args.preset,
                        "frames": args.frames,
                        "batch": args.batch,
                        "device": device,
                        "core": cores[rank % len(cores)] if device == "cpu" else None,
                        "steps": args.steps,
                        "folder": folder,
                    }
                    for rank in range(count)
                ]
                ranks = run_children(
                    "scaling_task:measure_rank",
                    tasks,
                    threads=1,
                    variables=_variables(count),
                    timeout=args.timeout,
                )
                report.measurements.append({"ranks": count, "round": repeat, "results": ranks})
                title = f"{args.preset}, {args.frames} frames, {args.batch} clips a rank, on {device}"
                report.tables = [make_table(report.measurements, title, places)]
                done += 1
                progress(done, total)


def _variables(count: int) -> list[dict[str, str]]:
    """What a launcher sets for each rank."""
    from trainer.distributed.environment import free_port

    port = str(free_port())
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    return [{**common, "RANK": str(r), "LOCAL_RANK": str(r), "MASTER_PORT": port} for r in range(count)]


def make_table(measurements: list[dict[str, Any]], title: str, places: int) -> ResultTable:
    """Medians of the rounds. places: cores or GPUs."""
    rates: dict[int, list[float]] = {}
    cpu: dict[int, list[float]] = {}
    for each in measurements:
        clips = sum(rank["clips"] for rank in each["results"])
        seconds = max(rank["seconds"] for rank in each["results"])
        rates.setdefault(each["ranks"], []).append(clips / seconds)
        used = sum(rank["cpu"] for rank in each["results"])
        cpu.setdefault(each["ranks"], []).append(used / clips)
    counts = sorted(rates)
    one, one_cpu = median(rates[counts[0]]) / counts[0], median(cpu[counts[0]])
    rows = []
    for count in counts:
        rate, used = median(rates[count]), median(cpu[count])
        at_once = min(count, places)
        shared = f"{count} ranks share {places} cores" if count > places else ""
        rows.append(
            (
                str(count),
                shared,
                f"{rate:.2f}",
                f"{min(rates[count]):.2f}-{max(rates[count]):.2f}",
                f"{100 * rate / (one * at_once):.0f} %",
                f"{1000 * used:.1f}",
                f"{100 * one_cpu / used:.0f} %",
            )
        )
    columns = ("ranks", "", "clips/s", "min-max", "efficiency", "CPU ms a clip", "by CPU time")
    note = (
        f"Efficiency: clips per second by those of {format_count(counts[0], 'rank')} times the cores "
        "or GPUs in use; by CPU time, the CPU time of a clip there by that here, which other programs "
        "disturb less."
    )
    others = [_others(each["results"]) for each in measurements]
    return ResultTable(f"ranks: {title}", columns, tuple(rows), (note, *interference(others)))


def _others(ranks: list[dict[str, Any]]) -> float:
    """Cores that other programs used, of those of the ranks. A rank counts those that share its core, too."""
    by_core: dict[int | None, list[dict[str, Any]]] = {}
    for rank in ranks:
        by_core.setdefault(rank["core"], []).append(rank)
    return sum(
        max(0.0, first["others"] - sum(rank["cpu"] for rank in rest) / first["seconds"])
        for first, *rest in by_core.values()
    )
