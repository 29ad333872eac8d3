"""`bench.py pipeline`: training clips per second of this project's loader and of PyTorch DataLoaders."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from pipelines.benchmark.measure import LoaderMeasurement, choose_cores, estimate_seconds, measure_all
from pipelines.benchmark.report import draw_rates, format_table, interference_warning, summarise, write_report
from pipelines.benchmark.task import THIS_LOADER
from pipelines.benchmark.videos import make_videos
from pipelines.benchmark.workload import check_policies, combine_workloads
from trainer.benchmark.arguments import add_common
from trainer.monitoring.progress import show_progress

HELP = "from video files to batches of clips, on the CPU"
LOADERS = (THIS_LOADER, "torchcodec", "PyAV", "decord")


def add_arguments(job: argparse.ArgumentParser) -> None:
    job.add_argument("--frames", type=int, action="append", help="of a clip; repeatable (8, 16)")
    videos = job.add_mutually_exclusive_group()
    videos.add_argument("--gop", type=int, action="append", help="keyframe interval; repeatable (250, 12)")
    videos.add_argument(
        "--videos", type=Path, metavar="MANIFEST", help="your own videos instead of the generated ones"
    )
    policy = "or none; repeatable (rand-m7-n4-mstd0.5-inc1)"
    job.add_argument("--rand-augment", action="append", metavar="POLICY", help=policy)
    job.add_argument("--seconds", type=float, default=15.0, help="of each measurement (%(default)s)")
    job.add_argument("--repeats", type=int, default=3, help="rounds (%(default)s)")
    job.add_argument("--cores", type=int, help="that each loader may use (all)")
    add_common(job)


def run(args: argparse.Namespace) -> int:
    """Measures, prints and writes; returns the exit code."""
    cores = choose_cores(args.cores)
    policies = args.rand_augment or ["rand-m7-n4-mstd0.5-inc1"]
    check_policies(policies)
    manifests = {args.videos.stem: args.videos} if args.videos else _generate_videos(args)
    workloads = combine_workloads(manifests, args.frames or [8, 16], policies)
    planned = len(LOADERS) * len(workloads) * args.repeats
    print(f"{planned} measurements, about {estimate_seconds(planned, args.seconds) / 60:.0f} minutes")
    measurements: list[LoaderMeasurement] = []
    code = 0
    try:
        with show_progress("measuring") as progress:
            for one in measure_all(LOADERS, workloads, args.repeats, args.seconds, cores, progress):
                measurements.append(one)
    except KeyboardInterrupt:
        if not measurements:
            raise
        code = 130
    summaries = summarise(measurements)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(format_table(summaries), interference_warning(measurements))
    write_report(args.out, measurements, len(cores), args.seconds)
    draw_rates(args.out / "clips_per_second.png", summaries)
    print(f"wrote results.json, results.csv, results.md and clips_per_second.png to {args.out}")
    return code


def _generate_videos(args: argparse.Namespace) -> dict[str, Path]:
    manifests = {}
    for gop in args.gop or (250, 12):
        with show_progress(f"writing videos with a keyframe every {gop} frames") as progress:
            manifests[f"GOP {gop}"] = make_videos(args.out / "videos", gop, progress=progress)
    return manifests
