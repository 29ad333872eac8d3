"""The jobs of `prepare` that read a manifest: balance it, or compare it with itself and with its videos."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipelines.dataset.manifest import Manifest
from pipelines.dataset.packet_table import index_hint, packets_path
from pipelines.dataset.prepare.build import check_manifest
from pipelines.dataset.prepare.class_balance import balance
from pipelines.dataset.prepare.verify import verify_manifest
from pipelines.formatting import printable
from pipelines.worker_pool import ProgressOf

Parents = Sequence[argparse.ArgumentParser]


def add_manifest_jobs(
    jobs: Any, *, out: Parents, deep: Parents, workers: Parents, progress_of: ProgressOf
) -> None:
    """Add a parser for each job to `jobs`; it sets `run`, from arguments to the exit code.

    out, deep, workers: parsers of the options that jobs share.
    """

    def add(
        name: str, run: Callable[[argparse.Namespace], int], parents: Parents, help: str
    ) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = jobs.add_parser(name, parents=list(parents), help=help)
        parser.set_defaults(run=run)
        parser.add_argument("manifest", type=Path)
        return parser

    def run_balance(args: argparse.Namespace) -> int:
        new = balance(args.manifest, args.out, args.power)
        print(f"wrote {printable(new.path)}: {len(new)} videos of {len(new.class_names)} classes")
        if packets_path(args.manifest).exists():
            print(index_hint(new.path))
        return 0

    def run_check(args: argparse.Namespace) -> int:
        with progress_of("checking") as progress:
            report = check_manifest(args.manifest, workers=args.workers, deep=args.deep, progress=progress)
        print(report.summary())
        return 1 if report.bad else 0

    def run_verify(args: argparse.Namespace) -> int:
        manifest = Manifest.open(args.manifest)
        with progress_of("verifying") as progress:
            result = verify_manifest(manifest, progress=progress)
        result.write_list()
        print(result.summary())
        return 1 if result.is_wrong or (result.repeated_rows and not args.allow_repeats) else 0

    balancing = add("balance", run_balance, out, "weights, so that rare classes are drawn more often")
    balancing.add_argument("--power", type=float, default=1.0, help="0 as they occur, 1 all equally often")
    add("check", run_check, [*deep, *workers], "compare a manifest with its videos")
    verify = add("verify", run_verify, [], "check every row of a manifest; reads no video")
    verify.add_argument("--allow-repeats", action="store_true", help="exit with 0 if rows only repeat videos")
