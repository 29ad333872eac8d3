"""The job `report` of `prepare`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.arguments import file_named, integer, number
from pipelines.dataset.manifest import Manifest
from pipelines.formatting import printable
from pipelines.worker_pool import ProgressOf

_OPENED = 300
_COPIES = 10_000
_TRANSCODED = 8
_SECONDS = 5.0


def add_report_job(
    jobs: Any,
    parents: Sequence[argparse.ArgumentParser],
    progress_of: ProgressOf,
) -> None:
    """Add the parser to `jobs`; it sets `run`, from arguments to the exit code. See `write_report`.

    parents: of the option `workers`.
    """

    def run_report(args: argparse.Namespace) -> int:
        from pipelines.report.write_report import write_report  # imports DALI, which takes seconds

        write_report(
            Manifest.open(args.manifest), args.out, opened=args.sample, copies=args.copies,
            transcoded=args.transcode, seconds=args.seconds, workers=args.workers, progress_of=progress_of,
        )  # fmt: skip
        print(f"wrote {printable(args.out)}")
        return 0

    report: argparse.ArgumentParser = jobs.add_parser(
        "report", parents=list(parents), help="one HTML page about a manifest and its videos"
    )
    report.set_defaults(run=run_report)
    report.add_argument("manifest", type=Path)
    report.add_argument("--out", type=file_named(".html"), required=True, help="page to write (report.html)")
    report.add_argument("--sample", type=integer(1), default=_OPENED, help="videos to open (%(default)s)")
    report.add_argument(
        "--copies", type=integer(0), default=_COPIES,
        help="videos to compare with others in search of copies; 0: none (%(default)s)",
    )  # fmt: skip
    report.add_argument(
        "--transcode", type=integer(0), default=_TRANSCODED,
        help="videos to transcode to measure the gain; 0: none (%(default)s)",
    )  # fmt: skip
    report.add_argument(
        "--seconds", type=number(0, 3600), default=_SECONDS,
        help="of each measurement of the speed; 0: none (%(default)s)",
    )  # fmt: skip
