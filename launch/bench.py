"""Measure training clips per second of this project's loader and of PyTorch DataLoaders.

    python launch/bench.py pipeline
    python launch/bench.py pipeline --frames 16 --gop 12 --rand-augment none --seconds 30
    python launch/bench.py pipeline --videos data/train.arrow --out runs/bench-own

Exit codes: 0 done; 2 nothing was measured, with the reason in the message; 130 interrupted (the results so
far are printed and written).
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from pipelines.benchmark.measure import LoaderMeasurement, choose_cores, estimate_seconds, measure_all
from pipelines.benchmark.report import draw_rates, format_table, interference_warning, summarise, write_report
from pipelines.benchmark.task import THIS_LOADER
from pipelines.benchmark.videos import make_videos
from pipelines.benchmark.workload import check_policies, combine_workloads
from pipelines.errors import DataError
from trainer.command import command_parser
from trainer.monitoring.progress import show_progress

LOADERS = (THIS_LOADER, "torchcodec", "PyAV", "decord")


def parse() -> argparse.Namespace:
    parser = command_parser(__doc__)
    jobs = parser.add_subparsers(dest="job", required=True, metavar="JOB")
    job = jobs.add_parser("pipeline", help="from video files to batches of clips, on the CPU")
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
    job.add_argument("--out", type=Path, default=Path("runs/bench"), help="for all files (%(default)s)")
    args = parser.parse_args()
    for name, values in {"frames": args.frames, "gop": args.gop, "repeats": [args.repeats]}.items():
        if min(values or [1]) < 1:
            job.error(f"--{name} must be at least 1, not {min(values)}")
    if args.seconds <= 0:
        job.error(f"--seconds must be above 0, not {args.seconds:g}")
    return args


def run(args: argparse.Namespace) -> int:
    cores = choose_cores(args.cores)
    policies = args.rand_augment or ["rand-m7-n4-mstd0.5-inc1"]
    check_policies(policies)
    manifests = {args.videos.stem: args.videos} if args.videos else generate_videos(args)
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


def generate_videos(args: argparse.Namespace) -> dict[str, Path]:
    manifests = {}
    for gop in args.gop or (250, 12):
        with show_progress(f"writing videos with a keyframe every {gop} frames") as progress:
            manifests[f"GOP {gop}"] = make_videos(args.out / "videos", gop, progress=progress)
    return manifests


if __name__ == "__main__":
    try:
        sys.exit(run(parse()))
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; nothing was measured", file=sys.stderr)
        sys.exit(130)
