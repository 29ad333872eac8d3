"""`bench.py pipeline`: training clips per second of this project's loader and of PyTorch DataLoaders."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from pipelines.arguments import integer
from pipelines.benchmark.measure import LoaderMeasurement, choose_cores, estimate_seconds, measure_all
from pipelines.benchmark.report import draw_rates, format_table, interference_warning, summarise, write_report
from pipelines.benchmark.task import THIS_LOADER
from pipelines.benchmark.videos import FOOTAGES, make_videos
from pipelines.benchmark.workload import check_policies, combine_workloads
from trainer.benchmark.arguments import add_common, positive
from trainer.errors import RunError
from trainer.monitoring.progress import show_progress

HELP = "from video files to batches of clips, on the CPU"
LOADERS = (THIS_LOADER, "torchcodec", "torchcodec, uint8", "PyAV", "decord")


def add_arguments(job: argparse.ArgumentParser) -> None:
    job.add_argument(
        "--frames", type=integer(1), action="append", help="frames of a clip; repeatable (8, 16)"
    )
    videos = job.add_mutually_exclusive_group()
    videos.add_argument(
        "--gop",
        type=integer(1),
        action="append",
        help="keyframe interval; repeatable (250, 12; see --footage)",
    )
    videos.add_argument(
        "--videos", type=Path, metavar="MANIFEST", help="your own videos instead of the generated ones"
    )
    kinds = ", ".join(
        f"{name}: {' and '.join(map(str, kind.keyframe_intervals))}" for name, kind in FOOTAGES.items()
    )
    job.add_argument(
        "--footage",
        action="append",
        choices=tuple(FOOTAGES),
        help=f"kind of generated videos; repeatable (h264). Keyframe intervals without --gop: {kinds}",
    )
    policy = "RandAugment, or none; repeatable (rand-m7-n4-mstd0.5-inc1)"
    job.add_argument("--rand-augment", action="append", metavar="POLICY", help=policy)
    job.add_argument(
        "--seconds", type=positive, default=15.0, help="length of each measurement (%(default)s)"
    )
    job.add_argument("--repeats", type=integer(1), default=3, help="number of rounds (%(default)s)")
    job.add_argument("--cores", type=integer(1), help="cores that each loader may use (all)")
    add_common(job, "pipeline")


def run(args: argparse.Namespace) -> None:
    """Measures; prints and writes the results, also those before an error."""
    cores = choose_cores(args.cores)
    policies = args.rand_augment or ["rand-m7-n4-mstd0.5-inc1"]
    check_policies(policies)
    if args.videos and args.footage:
        raise RunError("--footage is of generated videos; leave it out with --videos")
    manifests = {args.videos.stem: args.videos} if args.videos else _generate_videos(args)
    workloads = combine_workloads(manifests, args.frames or [8, 16], policies)
    planned = len(LOADERS) * len(workloads) * args.repeats
    print(f"{planned} measurements, about {estimate_seconds(planned, args.seconds) / 60:.0f} minutes")
    measurements: list[LoaderMeasurement] = []
    try:
        with show_progress("measuring") as progress:
            for one in measure_all(LOADERS, workloads, args.repeats, args.seconds, cores, progress):
                measurements.append(one)
    finally:
        if measurements:
            summaries = summarise(measurements)
            console = Console(width=None if sys.stdout.isatty() else 200)
            console.print(format_table(summaries), interference_warning(measurements))
            write_report(args.out, measurements, len(cores), args.seconds)
            draw_rates(args.out / "clips_per_second.png", summaries)
            print(f"wrote results.json, results.csv, results.md and clips_per_second.png to {args.out}")


def _generate_videos(args: argparse.Namespace) -> dict[str, Path]:
    manifests = {}
    for name in dict.fromkeys(args.footage or ("h264",)):
        footage = FOOTAGES[name]
        for gop in args.gop or footage.keyframe_intervals:
            title = f"{footage.name}, a keyframe every {gop} frames"
            with show_progress(f"writing videos: {title}") as progress:
                videos = make_videos(args.out / "videos", gop, footage=name, progress=progress)
            manifests[f"GOP {gop}" if name == "h264" else f"{footage.name}, GOP {gop}"] = videos
    return manifests
