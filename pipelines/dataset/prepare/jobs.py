"""The jobs of `prepare` that list videos for a manifest: their arguments, and the reader of each format."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, get_args

from pipelines.dataset.manifest import Manifest, SourceKind
from pipelines.dataset.packet_table import index_hint
from pipelines.dataset.prepare.activitynet import SUBSETS, list_activitynet
from pipelines.dataset.prepare.build import build_manifest
from pipelines.dataset.prepare.class_names import read_class_names
from pipelines.dataset.prepare.duplicates import compare_with_other_manifests
from pipelines.dataset.prepare.folder import read_folder
from pipelines.dataset.prepare.frame_folders import FRAME_RATE
from pipelines.dataset.prepare.hacs import list_hacs
from pipelines.dataset.prepare.kinetics import VERSIONS, list_kinetics
from pipelines.dataset.prepare.kinetics710_union import list_kinetics710
from pipelines.dataset.prepare.listing import Listing
from pipelines.dataset.prepare.moments_in_time import list_moments
from pipelines.dataset.prepare.parts import begin_part, end_part, parse_part, read_command
from pipelines.dataset.prepare.probe_listing import parts_folder, probe_part
from pipelines.dataset.prepare.probe_log import WHOLE
from pipelines.dataset.prepare.something_something import list_something
from pipelines.dataset.prepare.something_something_v1 import list_something_v1
from pipelines.dataset.prepare.table import read_table
from pipelines.dataset.prepare.transcode import TranscodeOptions, transcode_manifest
from pipelines.dataset.prepare.untrimmed import Unit
from pipelines.errors import DataError
from pipelines.formatting import format_count, printable
from pipelines.worker_pool import ProgressOf

_VIDEOS = "folder of the videos, searched at any depth; repeatable"
_FRAMES = "folder of the folders of frames, searched at any depth; repeatable"
_FPS = "frames per second of the frames (%(default)s)"


def add_listing_jobs(jobs: Any, parents: Sequence[argparse.ArgumentParser], progress_of: ProgressOf) -> None:
    """Add a parser for each format to `jobs`; it sets `list_videos`, from arguments to a `Listing`."""
    part = argparse.ArgumentParser(add_help=False)
    part.add_argument(
        "--part", type=parse_part, default=WHOLE, help="I/N: do part I of N; `merge` then writes the manifest"
    )

    def add(
        name: str,
        help: str,
        list_videos: Callable[[argparse.Namespace], Listing | None],
        annotations: str = "",
        videos: bool = False,
        classes: bool = False,
    ) -> argparse.ArgumentParser:
        """annotations, videos, classes: whether there is this argument; of the first, its help."""
        parser: argparse.ArgumentParser = jobs.add_parser(name, parents=[*parents, part], help=help)
        parser.set_defaults(list_videos=list_videos, lists_part=False)
        if annotations:
            parser.add_argument("annotations", type=Path, help=annotations)
        if videos:
            parser.add_argument("--videos", type=Path, action="append", required=True, help=_VIDEOS)
        if classes:
            about = "text file: a class name per line, by label"
            parser.add_argument("--classes", type=read_class_names, help=about)
        return parser

    folder = add(
        "folder",
        "one folder per class",
        lambda args: read_folder(args.videos, args.classes, more_extensions=args.extension),
        classes=True,
    )
    folder.add_argument("videos", type=Path, help="the folder of the class folders")
    folder.add_argument(
        "--extension", action="append", default=[], help="a further file extension of videos; repeatable"
    )

    table = add(
        "table",
        "CSV or text, a video per line",
        lambda args: read_table(
            args.table,
            args.root,
            args.classes,
            columns=(args.path_column, args.label_column, args.weight_column),
        ),
        classes=True,
    )
    table.add_argument("table", type=Path, help="lines of `path,label` or `path label`")
    table.add_argument("--root", type=Path, help="what its paths are relative to (the table's folder)")
    for column in ("path", "label", "weight"):
        table.add_argument(f"--{column}-column", help=f"the {column}'s name in the header, or number from 1")

    kinetics = add(
        "kinetics",
        "Kinetics-400, -600 or -700, as published",
        lambda args: list_kinetics(args.annotations, args.videos, version=args.version),
        annotations="CSV or JSON of one split, such as train.csv",
        videos=True,
    )
    about = "default: the one with exactly these classes"
    kinetics.add_argument("--version", choices=list(VERSIONS), help=about)

    union = add(
        "kinetics710",
        "the training splits of all Kinetics in one, without held-out videos",
        lambda args: list_kinetics710(args.train, args.held_out, args.videos),
        videos=True,
    )
    for name, help in (
        ("--train", "training annotations, CSV or JSON"),
        ("--held-out", "all validation and test annotations"),
    ):
        union.add_argument(name, type=Path, nargs="+", required=True, help=help)

    moments = add(
        "mit",
        "Moments in Time V1, as published",
        lambda args: list_moments(args.annotations, args.videos, args.categories),
        annotations="trainingSet.csv or validationSet.csv",
    )
    about = "folder of the class folders of the split"
    moments.add_argument("--videos", type=Path, required=True, help=about)
    moments.add_argument("--categories", type=Path, required=True, help="moments_categories.txt")

    something = add(
        "ssv2",
        "Something-Something V2, as published",
        lambda args: list_something(
            args.annotations, args.videos, args.labels, frames=args.frames, fps=args.fps
        ),
        annotations="something-something-v2-train.json or -validation.json",
    )
    either = something.add_mutually_exclusive_group(required=True)
    either.add_argument("--videos", type=Path, action="append", default=[], help=_VIDEOS)
    either.add_argument(
        "--frames", type=Path, action="append", default=[], help=f"instead of files: {_FRAMES}"
    )
    something.add_argument("--fps", type=float, default=FRAME_RATE, help=_FPS)
    something.add_argument("--labels", type=Path, required=True, help="something-something-v2-labels.json")

    first = add(
        "ssv1",
        "Something-Something V1, as published: folders of JPEG frames",
        lambda args: list_something_v1(args.annotations, args.frames, args.labels, fps=args.fps),
        annotations="something-something-v1-train.csv or -validation.csv",
    )
    first.add_argument("--frames", type=Path, action="append", required=True, help=_FRAMES)
    first.add_argument("--labels", type=Path, required=True, help="something-something-v1-labels.csv")
    first.add_argument("--fps", type=float, default=FRAME_RATE, help=_FPS)

    for name, help, list_format, file in (
        ("activitynet", "ActivityNet 1.3", list_activitynet, "activity_net.v1-3.min.json"),
        ("hacs", "HACS Segments or Clips", list_hacs, "HACS_segments_v1.1.1.json or HACS_clips_v1.1.1.csv"),
    ):
        untrimmed = add(
            name,
            f"{help}, as published",
            partial(_list_untrimmed, list_format),
            annotations=file,
            videos=True,
            classes=True,
        )
        untrimmed.add_argument("--subset", choices=SUBSETS, required=True, help="of the annotations")
        about = "what a row is; default: segments for training and of HACS Clips, else whole videos"
        untrimmed.add_argument("--rows", choices=get_args(Unit), help=about)

    transcode = add(
        "transcode",
        "videos that decode fast, from those of a manifest",
        lambda args: _transcode(args, progress_of),
    )
    transcode.add_argument("manifest", type=Path, help="manifest of the videos to transcode")
    transcode.add_argument("--to", type=Path, required=True, help="folder for the transcoded videos")
    transcode.set_defaults(lists_part=True)
    for field in fields(TranscodeOptions):
        name = f"--{field.name.replace('_', '-')}"
        transcode.add_argument(name, type=int, default=field.default, help="(%(default)s)")


def _list_untrimmed(list_format: Callable[..., Listing], args: argparse.Namespace) -> Listing:
    return list_format(
        args.annotations, args.videos, subset=args.subset, unit=args.rows, class_names=args.classes
    )


def _transcode(args: argparse.Namespace, progress_of: ProgressOf) -> Listing:
    """The transcoded videos; of a part, those of the part."""
    if args.out.exists() and args.out.samefile(args.manifest):
        raise DataError(f"--out {printable(args.out)} is the manifest to transcode; give another file")
    options = TranscodeOptions(
        **{field.name: getattr(args, field.name) for field in fields(TranscodeOptions)}
    )
    manifest = Manifest.open(args.manifest)
    with progress_of("transcoding") as progress:
        return transcode_manifest(
            manifest, args.to, options, workers=args.workers, part=args.part, progress=progress
        )


def merge_arguments(out: Path, parse: Callable[[list[str]], argparse.Namespace]) -> argparse.Namespace:
    """The arguments that make the whole manifest `out`, once all its parts are done; see `read_command`.

    parse: parses the command of a part.
    """
    args = parse(read_command(out))
    if "list_videos" not in args or args.out.absolute() != out.absolute():
        raise DataError(f"{printable(parts_folder(out))} does not hold the parts of {printable(out)}")
    args.part = WHOLE
    return args


def run_listing_job(
    args: argparse.Namespace, command: Sequence[str], *, progress_of: ProgressOf, deep: bool
) -> None:
    """Make the manifest of what a job lists, or one part of it, and print the summary.

    Args:
        args: of one of the jobs of `add_listing_jobs`.
        command: the arguments that `args` were parsed from.
        deep: decode every frame.
    """
    part, count = args.part
    if args.part != WHOLE:
        begin_part(args.out, args.part, command)
    listing = args.list_videos(args)
    with progress_of("probing") as progress:
        shared: dict[str, Any] = {"workers": args.workers, "deep": deep, "progress": progress}
        if args.part != WHOLE:
            probed = probe_part(args.out, listing, WHOLE if args.lists_part else args.part, **shared)
        else:
            report = build_manifest(args.out, listing, **shared)
    if args.part != WHOLE:
        end_part(args.out, args.part)
        name = printable(args.out)
        print(f"part {part + 1} of {count} is done: {format_count(probed, 'video')}")
        print(f"`prepare merge {name}` writes the manifest when all parts are done.")
        return
    compare_with_other_manifests(report, workers=args.workers, progress_of=progress_of)
    print(report.summary())
    if listing.source == SourceKind.FILE:
        print(index_hint(args.out))
