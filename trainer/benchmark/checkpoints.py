"""`bench.py checkpoint`: saving and loading a checkpoint, beside writing and reading as many bytes."""

import argparse
import os
import tempfile
from statistics import median
from typing import Any

from models.config import PRESETS
from pipelines.arguments import integer
from trainer.benchmark.arguments import add_common, add_device, add_timeout, resolve_device
from trainer.benchmark.child import run_child
from trainer.benchmark.report import BenchmarkReport, ResultTable, interference

HELP = "saving and loading, beside the rate of the disk"


def add_arguments(job: argparse.ArgumentParser) -> None:
    job.add_argument(
        "--preset", choices=tuple(PRESETS), default="b16", help="model whose state is saved (%(default)s)"
    )
    job.add_argument("--repeats", type=integer(1), default=3, help="number of rounds (%(default)s)")
    add_device(job)
    add_timeout(job)
    add_common(job, "checkpoint")


def run(args: argparse.Namespace, report: BenchmarkReport) -> None:
    """Measures on the disk of --out. Raises MeasurementError where there is too little space."""
    device, threads = resolve_device(args.device), len(os.sched_getaffinity(0))
    arguments: dict[str, Any] = {"preset": args.preset, "device": device, "repeats": args.repeats}
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=args.out.absolute()) as folder:
        arguments |= {"threads": threads, "folder": folder}
        result = run_child(
            "checkpoint_task:measure_checkpoints", arguments, threads=threads, timeout=args.timeout
        )
    report.measurements.append(result)
    report.tables = [make_table(result, args.preset)]


def make_table(result: dict[str, Any], preset: str) -> ResultTable:
    """Medians of the rounds."""
    rounds, size = result["rounds"], result["bytes"]
    middle = {name: median(each[name] for each in rounds) for name in rounds[0]}
    rows = [
        (
            "copy to host memory: training pauses",
            "-",
            f"{middle['paused']:.3f}",
            _rate(size, middle["paused"]),
            "-",
        ),
        (
            "save, until it is visible",
            f"{middle['disk_write'] / 1e6:,.0f}",
            f"{middle['saved']:.3f}",
            _rate(size, middle["saved"]),
            f"{100 * size / middle['saved'] / middle['disk_write']:.0f} %",
        ),
        (
            "load, not in the page cache",
            f"{middle['disk_read'] / 1e6:,.0f}",
            f"{middle['loaded']:.3f}",
            _rate(size, middle["loaded"]),
            f"{100 * size / middle['loaded'] / middle['disk_read']:.0f} %",
        ),
    ]
    columns = ("what", "the disk alone, MB/s", "seconds", "MB/s", "of the disk")
    title = f"checkpoint of {preset}, {size / 1e6:,.0f} MB, 1 rank, medians of {len(rounds)} rounds"
    note = "The disk alone: as many bytes in one file, written and flushed, then read, in the same rounds."
    return ResultTable(
        title, columns, tuple(rows), (note, *interference([each["others"] for each in rounds]))
    )


def _rate(size: int, seconds: float) -> str:
    return f"{size / seconds / 1e6:,.0f}"
