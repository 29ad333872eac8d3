"""The jobs `shard` and `index` of `prepare`: their arguments, and what they print."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.dataset.manifest import Manifest
from pipelines.dataset.packet_table import packets_path
from pipelines.dataset.prepare.build import check_out
from pipelines.dataset.prepare.index import index_manifest
from pipelines.dataset.prepare.parts import parse_part
from pipelines.dataset.prepare.probe_log import WHOLE
from pipelines.dataset.prepare.shard import ShardOptions, finish_shards, parse_size, write_shards
from pipelines.dataset.prepare.summary import list_of
from pipelines.errors import DataError
from pipelines.formatting import format_count, format_size, printable
from pipelines.storage.object_store import is_url
from pipelines.worker_pool import ProgressOf


def add_shard_jobs(jobs: Any, parents: Sequence[argparse.ArgumentParser], progress_of: ProgressOf) -> None:
    """Add the parsers to `jobs`; each sets `run`, from arguments to the exit code."""
    shard = jobs.add_parser(
        "shard", parents=list(parents), help="pack videos into tar shards, with a manifest of byte ranges"
    )
    shard.add_argument("manifest", type=Path, help="manifest of the videos to pack")
    shard.add_argument("--out", required=True, help="folder or s3://BUCKET/PREFIX for the shards")
    shard.add_argument(
        "--manifest-out", type=check_out, help="manifest to write (in --out, by the manifest's name)"
    )
    shard.add_argument("--size", type=parse_size, default=2**30, help="of a shard at most (1GiB)")
    shard.add_argument(
        "--part", type=parse_part, default=WHOLE, help="I/N: write part I of N, and no manifest"
    )
    shard.set_defaults(run=lambda args: _shard(args, progress_of))
    index = jobs.add_parser(
        "index", parents=list(parents), help="packet indexes, with which clips are read without whole files"
    )
    index.add_argument("manifest", type=Path, help="manifest whose videos are indexed")
    index.set_defaults(run=lambda args: _index(args, progress_of))


def _shard(args: argparse.Namespace, progress_of: ProgressOf) -> int:
    source = Manifest.open(args.manifest)
    out = args.out if is_url(args.out) else str(Path(args.out).absolute())
    if is_url(out) and args.manifest_out is None:
        raise DataError("--manifest-out: name the manifest to write; it is a local file")
    target = args.manifest_out or check_out(Path(out) / args.manifest.name)
    if target.exists() and target.samefile(args.manifest):
        raise DataError(f"{printable(target)} is the manifest of the videos; give another --manifest-out")
    options = ShardOptions(out, target.absolute(), args.size)
    with progress_of("packing") as progress:
        shards = write_shards(source, options, workers=args.workers, part=args.part, progress=progress)
    part, parts = args.part
    if parts > 1:
        print(f"part {part + 1} of {parts}: {format_count(shards, 'shard')} in {printable(out)}")
        print("The same command without --part writes the manifest of all parts.")
        return 0
    report = finish_shards(source, options)
    manifest = report.manifest
    print(
        f"wrote {printable(manifest.path)}: {format_count(len(manifest), 'row')} in "
        f"{format_count(report.shards, 'shard')} of {printable(out)}, {format_size(report.bytes)}; "
        f"{report.indexed} rows with a packet index"
    )
    bad = list_of(manifest.path, "bad")
    report.bad.write_list(bad)
    if report.bad.total:
        print(*report.bad.table(), f"{printable(bad)} lists them.", sep="\n")
    return 0


def _index(args: argparse.Namespace, progress_of: ProgressOf) -> int:
    manifest = Manifest.open(args.manifest, indexed=False)
    with progress_of("indexing") as progress:
        indexed = index_manifest(manifest, workers=args.workers, progress=progress)
    path = packets_path(manifest.path)
    print(f"wrote {printable(path)}: {indexed} of {format_count(len(manifest), 'row')}")
    if indexed < len(manifest):
        print("The other videos have no index, or cannot be read: they are read as a whole.")
    return 0
