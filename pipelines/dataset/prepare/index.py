"""Writes the packet indexes of a manifest's videos."""

from contextlib import closing
from pathlib import Path

from pipelines.dataset.manifest import Manifest, ManifestRow
from pipelines.dataset.packet_table import write_packet_table
from pipelines.dataset.source import row_content
from pipelines.decode.packet_index import make_packet_index
from pipelines.decode.video_file import read_content
from pipelines.errors import DataError, VideoError
from pipelines.formatting import printable
from pipelines.worker_pool import Progress, ordered_map


def index_manifest(manifest: Manifest, *, workers: int, progress: Progress | None = None) -> int:
    """Read every video of a manifest, and write the packet indexes beside it; returns how many there are.

    A bad video, and one that cannot be indexed, has none: it is read as a whole.

    Raises DataError where the file cannot be written, or the manifest is damaged.
    """
    indexed = 0
    jobs = (_job(manifest, index) for index in range(len(manifest)))
    try:
        with (
            write_packet_table(manifest.path) as table,
            closing(
                ordered_map(
                    _record,
                    jobs,
                    total=len(manifest),
                    workers=workers,
                    progress=progress,
                    on_crash=lambda _: b"",
                )
            ) as records,
        ):
            for record in records:
                table.add(record)
                indexed += bool(record)
            table.finish(manifest.fingerprint)
    except OSError as error:
        raise DataError(
            f"the packet indexes of {printable(manifest.path)} cannot be written: {error.strerror}"
        ) from error
    return indexed


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
