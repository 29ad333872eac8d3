"""Building a manifest from labelled videos, and checking a manifest against its videos."""

from array import array
from collections.abc import Iterator
from contextlib import closing
from functools import lru_cache
from pathlib import Path

import numpy as np

from pipelines.dataset.manifest import Manifest, ManifestRow, encode_path, write_manifest
from pipelines.dataset.packet_table import check_packets
from pipelines.dataset.paths import check_writable
from pipelines.dataset.prepare.decode_cost import CostSummary
from pipelines.dataset.prepare.duplicates import add_duplicates
from pipelines.dataset.prepare.findings import Findings
from pipelines.dataset.prepare.listing import Listing
from pipelines.dataset.prepare.probe_listing import open_probe_log, probe_listing
from pipelines.dataset.prepare.probe_log import WHOLE, ProbeLog
from pipelines.dataset.prepare.probe_row import ProbedRow
from pipelines.dataset.prepare.summary import ManifestReport, list_of
from pipelines.dataset.probe import CRASHES, MISSING, VideoInfo
from pipelines.dataset.source import format_change, open_source
from pipelines.dataset.spot_check import common_folder, format_none_found
from pipelines.errors import DataError, VideoError
from pipelines.formatting import format_count, printable
from pipelines.worker_pool import Progress, ordered_map

CUT = "segments that reach beyond their video, cut to it"
OTHER_LENGTH = "videos whose length differs from that in the annotations"

_CACHED = 4  # videos: the segments of one follow one another


def build_manifest(
    out: Path, listing: Listing, *, workers: int, deep: bool = False, progress: Progress | None = None
) -> ManifestReport:
    """Probe every video of `listing` and write the usable ones to the manifest `out`.

    Paths under the manifest's folder are stored relative to it, so that the folder can be moved; other paths
    are stored absolute. The manifest has weights if the listing has. Videos that occur more than once are
    written, and are in the report's findings. What was probed is recorded in `<out>.parts` (see `ProbeLog`)
    until the manifest is written, so that an interrupted call, and the parts of `probe_part`, are continued.

    Args:
        workers: number of processes; with more than one, the caller's main module must be importable.
        deep: decode every frame of every video, which also finds damage inside the stream.
        progress: called after each video with the number of probed videos and of all.

    Raises:
        DataError: no video can be used, or only videos of weight 0; or `out` exists and is not a manifest.
    """
    check_out(out)
    total = len(listing)
    weights = [1.0] * total if listing.weights is None else listing.weights
    folder = out.absolute().parent
    sources = bool(listing.source) or any(listing.segments or ())
    bad, properties, cost = Findings(), Findings(), CostSummary()
    keys, row_keys = array("Q"), array("Q")
    counts = np.zeros(len(listing.class_names), np.int64)

    def good_rows(log: ProbeLog[ProbedRow]) -> Iterator[ManifestRow]:
        before = None
        for (path, label), weight, probed in zip(listing, weights, log.results(), strict=True):
            if isinstance(probed, VideoError):
                bad.add_reason(printable(str(probed)), path)
                keys.append(0)
                continue
            info = probed.info
            keys.append(probed.row_key)
            row_keys.append(probed.key)
            counts[label] += 1
            cost.add(path, info)
            notes = info.notes if path != before else ()  # once for all segments of a video
            for note in (*notes, *(["one frame only"] if info.frames == 1 else [])):
                properties.add(note, path)
            if probed.other_length and path != before:
                listing.findings.add(OTHER_LENGTH, path, probed.other_length)
            if probed.cut:
                listing.findings.add(CUT, path, f"{CUT}: {probed.cut}")
            before = path
            yield ManifestRow(
                stored_path(path, folder), 0, 0, label,
                info.frames, info.fps or listing.fps, info.width, info.height, info.codec, weight,
                listing.source, probed.first_frame, probed.video_frames,
            )  # fmt: skip
        if bad.total == total:
            log.remove()
            raise DataError(_none_usable(out, listing, bad))

    with open_probe_log(out) as log:
        _, kept = probe_listing(log, listing, WHOLE, workers=workers, deep=deep, progress=progress)
        if kept:
            listing.findings.note(f"{format_count(kept, 'video')} had been probed by an earlier call.")
        rows = good_rows(log)
        weighted = listing.weights is not None
        manifest = write_manifest(
            out, rows, listing.class_names, weighted=weighted, sources=sources, scratch=log.folder
        )
        _note_missing(bad, listing)
        add_duplicates(listing, keys, listing.findings)
        all_keys = np.frombuffer(row_keys, np.uint64)
        report = ManifestReport(manifest, bad, "bad", counts, listing.findings, properties, cost, all_keys)
        report.write_lists()
        log.remove()
    return report


def check_out(out: str | Path) -> Path:
    """The path `out`, to which a manifest can be written.

    Raises:
        DataError: `out` is a folder or an existing file that is not a manifest, such as the table; it cannot
            be written; or another file has the name of its packet indexes.
    """
    out = Path(out)
    if out.is_dir():
        raise DataError(
            f"{printable(out)} is a folder; give --out the manifest file to write, such as train.arrow"
        )
    if out.is_file() and out.suffix != ".arrow":
        with out.open("rb") as file:
            if file.read(6) not in (b"", b"ARROW1"):
                raise DataError(
                    f"{printable(out)} exists and is not a manifest; it is not replaced. Give another --out"
                )
    try:
        check_writable(out.parent)
    except OSError as error:
        raise DataError(
            f"{printable(out)} cannot be written: {printable(Path(error.filename))}: {error.strerror}. Give "
            "another --out"
        ) from error
    check_packets(out)
    return out


def check_manifest(
    path: Path, *, workers: int, deep: bool = False, progress: Progress | None = None
) -> ManifestReport:
    """Compare a manifest with its fingerprint, and its rows with the videos as they are now.

    A row whose values are not possible for a video is listed as a bad video.

    Args:
        workers, deep, progress: as for `build_manifest`.

    Raises:
        DataError: the manifest cannot be opened, or its content does not match its fingerprint.
    """
    manifest = Manifest.open(path)
    manifest.verify_fingerprint()
    bad, wrong = Findings(), set()
    missing: set[Path] = set()
    for index, reason in manifest.wrong_rows():
        wrong.add(index)
        bad.add_reason(printable(str(reason)), manifest.printable_path(index))

    def valid() -> Iterator[int]:
        return (index for index in range(len(manifest)) if index not in wrong)

    jobs = ((manifest.path_at(index), manifest.row(index), deep) for index in valid())
    total = len(manifest) - len(wrong)
    with closing(
        ordered_map(
            _defect, jobs, total=total, workers=workers, progress=progress, on_crash=lambda _: CRASHES
        )
    ) as defects:
        for index, defect in zip(valid(), defects, strict=True):
            if defect:
                bad.add_reason(printable(defect), manifest.printable_path(index))
            if defect == MISSING:
                missing.add(manifest.path_at(index).parent)
    findings = Findings()
    if bad.counted(MISSING) == len(manifest) > 0:
        findings.note(format_none_found(format_count(len(manifest), "video"), common_folder(list(missing))))
    report = ManifestReport(manifest, bad, "check", findings=findings)
    try:
        report.write_lists()
    except OSError as error:
        findings.note(f"That list could not be written: {error.strerror}.")
    return report


def _none_usable(out: Path, listing: Listing, bad: Findings) -> str:
    """The message for a listing without a usable video. Writes the list of the bad videos."""
    _note_missing(bad, listing)
    path = bad.write_list(list_of(out.absolute(), "bad"))
    count = format_count(bad.total, "video")
    lines = [f"no video can be used; {printable(path)} lists the defects of {count}:", *bad.table()]
    return "\n".join([*lines, *(f"Note: {note}" for note in listing.findings.notes)])


def _note_missing(bad: Findings, listing: Listing) -> None:
    """Note where files are searched, if most files of a table do not exist."""
    missing = bad.counted(MISSING)
    if listing.lines is not None and 2 * missing > len(listing):
        listing.findings.note(
            f"{missing} of {len(listing)} files do not exist. Relative paths start from the table's folder, "
            f"or from --root; the first file would be {printable(Path(listing.paths[0]).absolute())}."
        )


def stored_path(path: Path, folder: Path) -> str:
    """The path as a manifest in `folder` stores it: relative if it is below the folder, else absolute."""
    path = path.absolute()
    return encode_path(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _defect(job: tuple[Path, ManifestRow, bool]) -> str:
    """The defect of a row's video, to follow its name in a sentence; empty if it has none."""
    path, row, deep = job
    whole = ManifestRow(row.path, row.offset, row.length, 0, 1, row.fps, 1, 1, "", source=row.source)
    probed = _probe(path, whole, deep)
    return probed if isinstance(probed, str) else format_change(probed, row)


@lru_cache(_CACHED)
def _probe(path: Path, whole: ManifestRow, deep: bool) -> VideoInfo | str:
    """The properties of a video, or its defect. whole: a row of all of it.

    The error itself is not kept: its traceback has the packets of the video.
    """
    try:
        return open_source(path, whole).probe(deep=deep)
    except VideoError as defect:
        return str(defect)
