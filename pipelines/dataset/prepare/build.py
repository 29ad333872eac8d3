"""From a listing to a manifest, and from a manifest back to its videos: what is bad is set apart by name."""

from __future__ import annotations

import re
import stat
from array import array
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from functools import partial
from pathlib import Path

import numpy as np

from pipelines.dataset.manifest import Manifest, ManifestRow, encode_path, write_manifest
from pipelines.dataset.paths import check_writable
from pipelines.dataset.prepare.decode_cost import CostSummary
from pipelines.dataset.prepare.duplicates import (
    add_duplicates,
    compare_manifests,
    content_key,
    other_manifests,
)
from pipelines.dataset.prepare.findings import Findings
from pipelines.dataset.prepare.listing import Listing
from pipelines.dataset.prepare.summary import ManifestReport, list_of
from pipelines.dataset.probe import CRASHES, MISSING, VideoInfo, probe_video
from pipelines.decode.video_file import VideoFile
from pipelines.errors import DataError, VideoError
from pipelines.formatting import printable
from pipelines.spot_check import common_folder, format_none_found
from pipelines.worker_pool import ordered_map

Progress = Callable[[int, int], None]

_NAMED_SIBLINGS = 5
"""Other manifests of the folder for which shared videos are counted apart."""

_NOT_COMPARED = "other manifests of the folder that could not be compared"

_NUMBER = re.compile(r"(?<![\w(])\d+(\.\d+)?")


def build_manifest(
    out: Path, listing: Listing, *, workers: int, deep: bool = False, progress: Progress | None = None
) -> ManifestReport:
    """Probe every video of `listing` and write those that can be used to the manifest `out`.

    Files under the manifest's folder are written relative to it, so that the folder can be moved; others
    absolutely. The manifest appears when it is complete; it has weights where the listing has some. Videos
    that occur more than once stay, and are among the findings of the report.

    Args:
        workers: processes to probe in; with more than one, the caller's main module must be importable.
        deep: decode every frame of every video, which finds damage inside, too.
        progress: called after each video with the number of videos probed and of all.

    Raises:
        DataError: no video can be used, or only such of weight 0; or `out` is a file of another kind.
    """
    check_out(out)
    total = len(listing.videos)
    weights = [1.0] * total if listing.weights is None else listing.weights
    folder = out.absolute().parent
    bad, remarks, cost = Findings(), Findings(), CostSummary()
    keys, row_keys = array("Q"), array("Q")
    counts = np.zeros(len(listing.class_names), np.int64)

    def good_rows() -> Iterator[ManifestRow]:
        paths = (path for path, _ in listing.videos)
        with closing(
            ordered_map(
                partial(_examine, deep=deep),
                paths,
                total=total,
                workers=workers,
                progress=progress,
                on_crash=lambda _: (VideoError(CRASHES), 0),
            )
        ) as results:
            for (path, label), weight, (result, key) in zip(listing.videos, weights, results, strict=True):
                if isinstance(result, VideoError):
                    _add_bad(bad, path, result)
                    keys.append(0)
                    continue
                keys.append(key)
                row_keys.append(key)
                counts[label] += 1
                cost.add(path, result)
                for remark in _remarks(result):
                    remarks.add(remark, path)
                yield _row(stored_path(path, folder), label, result, weight)
        if bad.listed == total:
            raise DataError(_none_usable(out, listing, bad))

    manifest = write_manifest(out, good_rows(), listing.class_names, weighted=listing.weights is not None)
    _say_missing(bad, listing)
    add_duplicates(listing, keys, listing.findings)
    report = ManifestReport(
        manifest,
        bad,
        "left out",
        "bad",
        counts,
        listing.findings,
        remarks,
        cost,
        np.frombuffer(row_keys, np.uint64),
    )
    report.write_lists()
    return report


def new_manifest(text: str) -> Path:
    """The path of a manifest that is to be written; raises what `check_out` does."""
    check_out(Path(text))
    return Path(text)


def check_out(out: Path) -> None:
    """Refuse to replace a file that is no manifest, such as the table, and to write where nothing can be.

    Raises DataError, before anything was read or written.
    """
    if out.is_dir():
        raise DataError(
            f"{printable(out)} is a folder; --out names the manifest to write, such as train.arrow"
        )
    if out.is_file() and out.suffix != ".arrow":
        with out.open("rb") as file:
            if file.read(6) not in (b"", b"ARROW1"):
                raise DataError(
                    f"{printable(out)} exists and is no manifest: it is not replaced. Give another --out"
                )
    try:
        check_writable(out.parent)
    except OSError as error:
        raise DataError(
            f"{printable(out)} cannot be written: {printable(Path(error.filename))}: {error.strerror}. Give "
            "another --out"
        ) from error


def compare_with_other_manifests(
    report: ManifestReport, *, workers: int, progress_of: Callable[[str], AbstractContextManager[Progress]]
) -> None:
    """Add the videos that are also in the other manifests of the folder to the report's findings.

    How many files of each other manifest are read is bounded, see `compare_manifests`.

    Args:
        workers: processes, as for `build_manifest`.
        progress_of: gives, for what is being done, the context in which a function shows its progress.
    """
    manifest, findings = report.manifest, report.findings
    others: list[Manifest] = []
    for path in other_manifests(manifest.path):
        kind = printable(path.name) if len(others) < _NAMED_SIBLINGS else "further manifests of the folder"
        try:
            other = Manifest.open(path)
            if len(other) == 0:
                continue
            with progress_of(f"comparing with {printable(path.name)}") as progress:
                compare_manifests(
                    manifest,
                    report.keys,
                    other,
                    findings,
                    f"videos that are also in {kind}",
                    workers=workers,
                    progress=progress,
                )
        except DataError as error:
            findings.count(_NOT_COMPARED, printable(str(error)))  # which names the file
            findings.line(path, printable(f"not compared: {error}"))
        else:
            others.append(other)
    unlike = [
        printable(other.path.name)
        for other in others
        if other.class_names != manifest.class_names and set(other.class_names) & set(manifest.class_names)
    ]
    if unlike:
        more = f" and {len(unlike) - _NAMED_SIBLINGS} more" if len(unlike) > _NAMED_SIBLINGS else ""
        findings.note(
            f"Other classes, or in another order, in {', '.join(unlike[:_NAMED_SIBLINGS])}{more}: a run "
            "takes only manifests that agree. --classes gives them the same."
        )
    report.write_lists()


def check_manifest(
    path: Path, *, workers: int, deep: bool = False, progress: Progress | None = None
) -> ManifestReport:
    """Compare a manifest with its own fingerprint, and its rows with the videos as they are now.

    A row whose values cannot be those of a video is listed like a bad video.

    Args:
        workers, deep, progress: as for `build_manifest`.

    Raises:
        DataError: the manifest cannot be opened, or its content is not what was written.
    """
    manifest = Manifest.open(path)
    manifest.verify_fingerprint()
    bad, wrong = Findings(), set()
    missing: set[Path] = set()
    for index, reason in manifest.wrong_rows():
        wrong.add(index)
        _add_bad(bad, manifest.printable_path(index), reason)

    def others() -> Iterator[int]:
        return (index for index in range(len(manifest)) if index not in wrong)

    jobs = ((manifest.path_at(index), manifest.row(index), deep) for index in others())
    total = len(manifest) - len(wrong)
    with closing(
        ordered_map(
            _defect, jobs, total=total, workers=workers, progress=progress, on_crash=lambda _: CRASHES
        )
    ) as bad_samples:
        for index, defect in zip(others(), bad_samples, strict=True):
            if defect:
                _add_bad(bad, manifest.path_at(index), defect)
            if defect == MISSING:
                missing.add(manifest.path_at(index).parent)
    findings = Findings()
    if bad.counted(MISSING) == len(manifest) > 0:
        findings.note(
            format_none_found(
                f"{len(manifest)} video{'s' * (len(manifest) > 1)}", common_folder(list(missing))
            )
        )
    report = ManifestReport(manifest, bad, "still in the manifest", "check", findings=findings)
    try:
        report.write_lists()
    except OSError as error:
        findings.note(f"That list could not be written: {error.strerror}.")
    return report


def _examine(path: Path, *, deep: bool) -> tuple[VideoInfo | VideoError, int]:
    """What a video is like, or its defect, and its content key."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise VideoError("is a folder" if stat.S_ISDIR(mode) else "is no regular file")
        info = probe_video(path, deep=deep)
    except VideoError as defect:
        return defect, 0
    except OSError as error:
        return VideoError(f"cannot be read: {error.strerror}"), 0
    return info, content_key(path)


def _remarks(info: VideoInfo) -> Iterator[str]:
    yield from info.notes
    if info.frames == 1:
        yield "one frame only"


def _add_bad(bad: Findings, path: Path | str, defect: VideoError | str) -> None:
    """Add a bad video; reasons that differ in numbers only are counted together."""
    reason = printable(str(defect))
    bad.add(_NUMBER.sub("N", reason), path, reason)


def _none_usable(out: Path, listing: Listing, bad: Findings) -> str:
    """The message for a listing without a video that can be used; writes the list of the bad videos."""
    _say_missing(bad, listing)
    path = bad.write_list(list_of(out.absolute(), "bad"))
    lines = [f"none of {bad.listed} videos can be used; {printable(path)} says why:", *bad.table()]
    return "\n".join([*lines, *(f"Note: {note}" for note in listing.findings.notes)])


def _say_missing(bad: Findings, listing: Listing) -> None:
    """Where most files of a table are not there, say where they are looked for."""
    missing = bad.counted(MISSING)
    if listing.lines is not None and 2 * missing > len(listing.videos):
        first = printable(listing.videos[0][0].absolute())
        listing.findings.note(
            f"{missing} of {len(listing.videos)} files are not there. Relative paths are taken from the "
            f"table's folder, or from --root; the first file is looked for at {first}."
        )


def _row(path: str, label: int, info: VideoInfo, weight: float) -> ManifestRow:
    return ManifestRow(
        path=path,
        offset=0,
        length=0,
        label=label,
        frames=info.frames,
        fps=info.fps,
        width=info.width,
        height=info.height,
        codec=info.codec,
        weight=weight,
    )


def stored_path(path: Path, folder: Path) -> str:
    """How a manifest in `folder` names the file: relative where it lies below, otherwise absolute."""
    path = path.absolute()
    return encode_path(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _defect(job: tuple[Path, ManifestRow, bool]) -> str:
    """What is wrong with a row's video, in words that follow its name; empty if nothing is."""
    path, row, deep = job
    try:
        info = probe_video(_piece(path, row) if row.length else path, deep=deep)
    except VideoError as defect:
        return str(defect)
    now, then = _likeness(info), _likeness(row)
    return "" if now == then else f"has {now}, the manifest says {then}: it was changed since"


def _likeness(video: VideoInfo | ManifestRow) -> str:
    return f"{video.frames} frames of {video.width}x{video.height} in {video.codec}"


def _piece(path: Path, row: ManifestRow) -> bytes:
    with VideoFile(path) as shard:
        return shard.read_range(row.offset, row.length)
