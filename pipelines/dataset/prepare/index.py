"""Writes the packet indexes of a manifest's videos."""

from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.dataset.manifest import Manifest, ManifestRow
from pipelines.dataset.packet_table import write_packet_table
from pipelines.dataset.source import row_content
from pipelines.decode.packet_index import make_packet_index
from pipelines.decode.video_file import read_content
from pipelines.errors import DataError, VideoError
from pipelines.formatting import printable
from pipelines.worker_pool import Progress, ordered_map


def index_manifest(manifest: Manifest, *, workers: int, progress: Progress | None = None) -> int:
    """Read every video of a manifest once, and write the packet indexes beside it.

    Returns the number of rows with one. A bad video, and one that cannot be indexed, has none: it is read as
    a whole. Rows of one video share its index. Memory: 34 bytes a row, measured
    with a million rows.

    Args:
        progress: called after each video with the number of videos read and of all.

    Raises DataError where the file cannot be written, or the manifest is damaged.
    """
    indexed = 0
    firsts = _first_rows(manifest)
    own = np.flatnonzero(firsts == np.arange(len(firsts)))
    jobs = (_job(manifest, int(index)) for index in own)
    try:
        with (
            write_packet_table(manifest.path) as table,
            closing(
                ordered_map(
                    _record,
                    jobs,
                    total=len(own),
                    workers=workers,
                    progress=progress,
                    on_crash=lambda _: b"",
                )
            ) as records,
        ):
            for row in range(len(firsts)):
                first = int(firsts[row])
                indexed += table.add(next(records)) if first == row else table.repeat(first)
            table.finish(manifest.fingerprint)
    except OSError as error:
        raise DataError(
            f"the packet indexes of {printable(manifest.path)} cannot be written: {error.strerror}"
        ) from error
    return indexed


def _first_rows(manifest: Manifest) -> NDArray[np.int64]:
    """For each row the first row with the same video."""
    keys = np.zeros(len(manifest), np.int64)
    for row in range(len(manifest)):
        if (job := _job(manifest, row)) is not None:
            keys[row] = hash(job[1].video)
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    place = np.arange(len(keys))
    place[1:][keys[1:] == keys[:-1]] = 0
    del keys
    np.maximum.accumulate(place, out=place)  # of the first of equal keys in `order`
    firsts = np.empty_like(order)
    firsts[order] = order[place]
    del order, place
    for row in map(int, np.flatnonzero(firsts != np.arange(len(firsts)))):
        job, before = _job(manifest, row), _job(manifest, int(firsts[row]))
        if job is None or before is None or job[1].video != before[1].video:  # only the same hash
            firsts[row] = row
    return firsts


def _job(manifest: Manifest, index: int) -> tuple[Path, ManifestRow] | None:
    """A row and its absolute path; None if its values are impossible."""
    try:
        return manifest.path_at(index), manifest.row(index)
    except VideoError:
        return None


def _record(job: tuple[Path, ManifestRow] | None) -> bytes:
    """The record of a row's video; empty where it has none."""
    if job is None:
        return b""
    try:
        packets = make_packet_index(read_content(row_content(*job)))
    except VideoError:
        return b""
    return b"" if packets is None else packets.to_bytes()
