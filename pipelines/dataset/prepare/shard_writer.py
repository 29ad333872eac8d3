"""Writing one shard: its videos are probed and indexed, written, read again and compared."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

import pyarrow as pa

from pipelines.atomic_file import atomic_file
from pipelines.dataset.manifest import Manifest, ManifestRow
from pipelines.dataset.manifest_file import ARROW_ERRORS
from pipelines.dataset.paths import decode_path
from pipelines.dataset.probe import VideoInfo, probe_video
from pipelines.dataset.shards import (
    end_archive,
    end_member,
    member_extension,
    sample_name,
    shard_name,
    start_member,
    write_member,
)
from pipelines.dataset.source import format_change, row_content
from pipelines.decode.packet_index import PacketIndex, make_packet_index
from pipelines.decode.video_file import RangedContent, VideoContent, read_content
from pipelines.errors import DataError, VideoError
from pipelines.formatting import printable
from pipelines.storage.object_store import is_url, object_size, read_ranges, upload

_COPIED = 8 * 2**20  # bytes at a time

_RESULT_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("length", pa.int64(), nullable=False),
        pa.field("packets", pa.large_binary(), nullable=False),
    ]
)

Examine = Callable[[VideoContent], tuple[VideoInfo, bytes]]
"""From a video to its properties and the record of its packet index, which is empty if it has none."""


class ShardStopped(Exception):
    """The command was interrupted; the shard is written anew by the next one."""


@dataclass(frozen=True)
class ShardJob:
    """What a worker needs to write a shard."""

    manifest: Path
    """Of the source videos."""
    number: int
    """Of the shard."""
    rows: range
    """Of the source manifest."""
    out: str
    """Folder, or URL of one, of the shards."""
    results: Path
    """Folder of the results."""
    running: Path
    """A file that exists while the command runs."""


@dataclass(frozen=True)
class WrittenVideo:
    """A row's video in a shard."""

    row: int
    """Of the source manifest."""
    offset: int
    length: int
    packets: bytes
    """The record of its packet index; empty if it has none."""


@dataclass(frozen=True)
class ShardResult:
    """A shard that was written and read again."""

    size: int
    """Bytes of the shard."""
    digest: str
    """Its SHA-256, as hexadecimal digits."""
    videos: Sequence[WrittenVideo]
    bad: Sequence[tuple[int, str]]
    """Rows that were left out, each with its reason."""


def location_of(out: str, number: int) -> str:
    """The path or URL of a shard."""
    return f"{out.rstrip('/')}/{shard_name(number)}"


def result_path(results: Path, number: int) -> Path:
    """The file of a shard's result. It exists if the shard is complete."""
    return results / f"{number:06d}.arrow"


def examine(content: VideoContent) -> tuple[VideoInfo, bytes]:
    """See `Examine`. Raises VideoError for a video that cannot be used."""
    info = probe_video(content)
    packets = make_packet_index(content)
    return info, b"" if packets is None else packets.to_bytes()


def write_shard(job: ShardJob, examine: Examine = examine) -> ShardResult:
    """Write a shard and its result; a shard that is complete is left as it is.

    Raises:
        DataError: the shard cannot be written, or is damaged when it is read again.
        ShardStopped: the command was interrupted.
    """
    found = read_result(job.results, job.number)
    if found is not None and _is_complete(job, found):
        return found
    location = location_of(job.out, job.number)
    remote = is_url(location)
    target = job.results / shard_name(job.number) if remote else Path(location)
    try:
        with atomic_file(target, sync=True) as partial:
            with partial.open("wb") as file:
                written = _write_samples(file, Manifest.open(job.manifest), job, examine)
                end_archive(file)
                file.flush()
                os.fsync(file.fileno())
            size, digest = _verify(partial, written.checksums)
        if remote:
            _store(target, location, size, digest)
            target.unlink()
    except OSError as error:
        raise DataError(
            f"{printable(target)} cannot be written: {error.strerror}; run the same command again once it can"
        ) from error
    result = ShardResult(size, digest, written.videos, written.bad)
    _write_result(job, result)
    return result


@dataclass(frozen=True)
class _Samples:
    videos: list[WrittenVideo]
    checksums: list[tuple[int, int, int]]
    """Offset, length and CRC-32 of each video."""
    bad: list[tuple[int, str]]


def _write_samples(file: BinaryIO, manifest: Manifest, job: ShardJob, examine: Examine) -> _Samples:
    samples = _Samples([], [], [])
    for rows in _rows_by_video(manifest, job.rows, samples.bad):
        if not job.running.exists():
            raise ShardStopped
        begin = file.tell()
        try:
            _write_sample(file, manifest, rows, samples, examine)
        except VideoError as error:
            file.seek(begin)
            file.truncate()
            samples.bad.extend((index, str(error)) for index, _ in rows)
    samples.bad.sort()
    return samples


def _rows_by_video(
    manifest: Manifest, rows: range, bad: list[tuple[int, str]]
) -> Iterator[list[tuple[int, ManifestRow]]]:
    """The rows, those of one video that follow each other together. Adds impossible rows to `bad`."""
    together: list[tuple[int, ManifestRow]] = []
    for index in rows:
        try:
            row = manifest.row(index)
        except VideoError as error:
            bad.append((index, str(error)))
            continue
        if together and together[0][1].video != row.video:
            yield together
            together = []
        together.append((index, row))
    if together:
        yield together


def _write_sample(
    file: BinaryIO,
    manifest: Manifest,
    rows: Sequence[tuple[int, ManifestRow]],
    samples: _Samples,
    examine: Examine,
) -> None:
    """Write the members of a video. Raises VideoError where it cannot be used."""
    index, row = rows[0]
    content = read_content(row_content(manifest.absolute_path(row), row))
    info, packets = examine(content)
    for _, each in rows:
        if change := format_change(info, each):
            raise VideoError(change)
    name = sample_name(index, len(manifest))
    write_member(file, f"{name}.cls", str(row.label).encode())
    write_member(file, f"{name}.json", _description(manifest, rows))
    length = len(content) if isinstance(content, bytes) else content.size
    start_member(file, f"{name}{member_extension(row.path)}", length)
    offset, checksum = file.tell(), 0
    for block in _blocks(content):
        file.write(block)
        checksum = crc32(block, checksum)
    if packets and PacketIndex.from_bytes(packets).crc != checksum:
        raise VideoError("was changed while it was read")
    end_member(file)
    samples.checksums.append((offset, length, checksum))
    samples.videos.extend(WrittenVideo(number, offset, length, packets) for number, _ in rows)


def _description(manifest: Manifest, rows: Sequence[tuple[int, ManifestRow]]) -> bytes:
    """The content of a sample's JSON member."""
    index, row = rows[0]
    about: dict[str, object] = {
        "row": index,
        "source": printable(row.path if is_url(row.path) else decode_path(row.path)),
        "label": row.label,
        "class": manifest.class_names[row.label],
        "frames": row.video_frames or row.frames,
        "fps": round(row.fps, 4),
        "width": row.width,
        "height": row.height,
        "codec": row.codec,
    }
    if row.is_segment:
        about["segments"] = [
            {"row": number, "label": part.label, "first_frame": part.first_frame, "frames": part.frames}
            for number, part in rows
        ]
    return json.dumps(about, ensure_ascii=False).encode()


def _blocks(content: bytes | RangedContent) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    for begin in range(0, content.size, _COPIED):
        yield from content.read_ranges([(begin, min(content.size, begin + _COPIED))])


def _verify(path: Path, checksums: Sequence[tuple[int, int, int]]) -> tuple[int, str]:
    """Size and SHA-256 of a shard, read from the disk; compares each video with what was read of its source.

    Raises DataError where they differ.
    """
    digest = sha256()
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # read from the disk, not from memory

        def read(length: int) -> int:
            checksum = 0
            while length and (block := file.read(min(length, _COPIED))):
                digest.update(block)
                checksum, length = crc32(block, checksum), length - len(block)
            return checksum

        for offset, length, expected in checksums:
            read(offset - file.tell())
            if read(length) != expected:
                raise DataError(
                    f"{printable(path)}: the video at byte {offset} is not what was written; check the disk"
                )
        read(path.stat().st_size - file.tell())
        return file.tell(), digest.hexdigest()


def _store(file: Path, url: str, size: int, digest: str) -> None:
    """Upload a shard, read it again and compare it. Raises DataError where it differs."""
    upload(file, url)
    stored = sha256()
    try:
        for begin in range(0, size, _COPIED):
            stored.update(read_ranges(url, [(begin, min(size, begin + _COPIED))])[0])
    except VideoError as error:
        raise DataError(f"{printable(url)} {error} after it was uploaded") from error
    if stored.hexdigest() != digest:
        raise DataError(f"{printable(url)} is not what was uploaded; run the same command again")


def _is_complete(job: ShardJob, result: ShardResult) -> bool:
    """Whether the shard of a result is where it should be, with its size."""
    location = location_of(job.out, job.number)
    try:
        size = object_size(location) if is_url(location) else Path(location).stat().st_size
    except (VideoError, FileNotFoundError):
        return False
    return size == result.size


def _write_result(job: ShardJob, result: ShardResult) -> None:
    columns = [[getattr(video, name) for video in result.videos] for name in _RESULT_SCHEMA.names]
    metadata = {"size": str(result.size), "sha256": result.digest, "bad": json.dumps(result.bad)}
    schema = _RESULT_SCHEMA.with_metadata(metadata)
    arrays = [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)]
    try:
        with (
            atomic_file(result_path(job.results, job.number), sync=True) as partial,
            pa.OSFile(os.fsencode(partial).decode(), "wb") as sink,
            pa.ipc.new_file(sink, schema) as file,
        ):
            file.write_batch(pa.record_batch(arrays, schema=schema))
    except OSError as error:
        raise DataError(f"{printable(job.results)} cannot be written: {error.strerror}") from error


def read_result(results: Path, number: int) -> ShardResult | None:
    """The result of a shard; None if there is none, or it is not whole."""
    path = result_path(results, number)
    try:
        with pa.OSFile(os.fsencode(path).decode()) as source:
            table = pa.ipc.open_file(source).read_all()
        metadata = table.schema.metadata
        columns = [table[name].to_pylist() for name in _RESULT_SCHEMA.names]
        videos = [WrittenVideo(*values) for values in zip(*columns, strict=True)]
        bad = [(int(row), str(reason)) for row, reason in json.loads(metadata[b"bad"])]
        return ShardResult(int(metadata[b"size"]), metadata[b"sha256"].decode(), videos, bad)
    except (FileNotFoundError, *ARROW_ERRORS, KeyError, TypeError):
        return None
