"""Make, verify or balance a manifest, transcode or check its videos, render data, or prepare image weights.

    python launch/prepare.py folder VIDEOS --out data/train.arrow      # VIDEOS/CLASS/VIDEO
    python launch/prepare.py table LIST.csv --root VIDEOS --out data/train.arrow
    python launch/prepare.py kinetics train.csv --videos VIDEOS --out data/k400/train.arrow
    python launch/prepare.py transcode data/train.arrow --to data/small --out data/small/train.arrow
    python launch/prepare.py balance data/train.arrow --power 0.5 --out data/balanced.arrow
    python launch/prepare.py shard data/train.arrow --out s3://bucket/k400 --manifest-out data/k400.arrow
    python launch/prepare.py motion data/motion
    python launch/prepare.py folder VIDEOS --out data/train.arrow --part 2/8     # on one of 8 machines
    python launch/prepare.py merge data/train.arrow
    python launch/prepare.py verify data/train.arrow
    python launch/prepare.py report data/train.arrow --out report.html
    python launch/prepare.py check data/train.arrow --deep
    python launch/prepare.py weights ViT-B-16.pt --out weights/clip_vit_b16.safetensors

Exit codes: 0 success, 1 `check` or `verify` found errors, 2 error (see the message), 130 or 143 interrupted.
"""

import argparse
import sys
from pathlib import Path

from pipelines.arguments import file_named, integer
from pipelines.dataset.prepare.build import check_out
from pipelines.dataset.prepare.jobs import add_listing_jobs, merge_arguments, run_listing_job
from pipelines.dataset.prepare.manifest_jobs import add_manifest_jobs
from pipelines.dataset.prepare.shard_jobs import add_shard_jobs
from pipelines.formatting import printable
from pipelines.report.job import add_report_job
from pipelines.synthetic.motion import render
from pipelines.worker_pool import usable_cores
from trainer.command import CommandParser, command_parser, prints_errors
from trainer.errors import UserError
from trainer.monitoring.progress import show_progress
from trainer.system.process_exit import exit_on_sigterm, exit_with, format_os_error


def parse(command: list[str]) -> argparse.Namespace:
    parser = command_parser(__doc__)
    jobs = parser.add_subparsers(dest="job", required=True, metavar="JOB")
    shared, deep, out = (CommandParser(add_help=False) for _ in range(3))
    workers = integer(1, most=1024)
    shared.add_argument("--workers", type=workers, default=usable_cores(), help="processes (%(default)s)")
    deep.add_argument("--deep", action="store_true", help="decode every frame: finds most damage inside")
    out.add_argument("--out", type=check_out, required=True, help="manifest to write (train.arrow)")
    add_listing_jobs(jobs, [out, deep, shared], show_progress)
    motion = jobs.add_parser("motion", parents=[shared], help="render the embedded data set")
    motion.add_argument("root", type=Path, help="folder for videos, train.arrow and val.arrow")
    for name, default in (("--train-clips", 3600), ("--val-clips", 800), ("--seed", 0)):
        motion.add_argument(name, type=integer(0), default=default, help="(%(default)s)")
    add_manifest_jobs(jobs, out=[out], deep=[deep], workers=[shared], progress_of=show_progress)
    add_shard_jobs(jobs, [shared], show_progress)
    add_report_job(jobs, [shared], show_progress)
    merge = jobs.add_parser("merge", help="write the manifest that was made in parts")
    merge.add_argument("manifest", type=Path, help="the --out of the parts")
    weights = jobs.add_parser("weights", help="the image ViT of a CLIP, timm or Hugging Face checkpoint")
    weights.add_argument("source", type=Path, help="file, archive of OpenAI, or folder of a model")
    weights.add_argument("--out", type=file_named(".safetensors"), required=True, help="to write")
    weights.set_defaults(run=write_image_weights)
    return parser.parse_args(command)


def write_image_weights(args: argparse.Namespace) -> int:
    from trainer.checkpoint.image_weights import prepare_image_weights  # imports PyTorch

    print(*map(printable, prepare_image_weights(args.source, args.out)), sep="\n")
    return 0


def run(command: list[str]) -> int:
    args = parse(command)
    if args.job == "merge":
        args = merge_arguments(args.manifest, parse)
    if args.job == "motion":
        with show_progress("rendering") as progress:
            settings = {name: getattr(args, name) for name in ("train_clips", "val_clips", "seed", "workers")}
            made = render(args.root, **settings, progress=progress, note=print)
        print("wrote", *map(printable, made))
    elif "run" in args:
        exit_code: int = args.run(args)
        return exit_code
    else:
        run_listing_job(args, command, progress_of=show_progress, deep=args.deep)
    return 0


@prints_errors
def main() -> int:
    exit_on_sigterm("run the same command again")
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        return run(sys.argv[1:])
    except OSError as error:
        raise UserError(format_os_error(error)) from error


if __name__ == "__main__":
    exit_with(main, "interrupted; run the same command again")
