"""Packs the videos of a manifest into tar shards, with a manifest of their byte ranges and packet indexes."""

from __future__ import annotations

import json
import re
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from pipelines.atomic_file import atomic_file
from pipelines.dataset.manifest import Manifest, ManifestRow, write_manifest
from pipelines.dataset.packet_table import PacketTableWriter, write_packet_table
from pipelines.dataset.prepare.build import stored_path
from pipelines.dataset.prepare.findings import Findings
from pipelines.dataset.prepare.shard_writer import (
    Examine,
    ShardJob,
    ShardResult,
    examine,
    location_of,
    read_result,
    write_shard,
)
from pipelines.dataset.probe import CRASHES, VideoInfo
from pipelines.dataset.shards import BLOCK
from pipelines.dataset.source import row_content
from pipelines.decode.video_file import VideoContent
from pipelines.errors import DataError, VideoError
from pipelines.formatting import printable
from pipelines.storage.object_store import check_url, is_url, object_size
from pipelines.worker_pool import IsolatedProcess, Progress, ordered_map

SETTINGS = "shards.json"
"""File with the source manifest and the options of the shards of a folder of results."""

MOST_SHARDS = 10**6

_PLAN = "first_rows.npy"
_SIZES = re.compile(r"(\d+(?:\.\d+)?)\s*(|[KMGT]i?)B?", re.I)
_LEAST, _MOST = 2**16, 2**42  # bytes of a shard
_PER_SAMPLE = 6 * BLOCK  # bytes of a sample's headers and small members
_ROWS_AT_ONCE = 4096

LEFT_OUT = "videos that are in no shard"


@dataclass(frozen=True)
class ShardOptions:
    """Where the shards go. Raises DataError for a value that cannot be used."""

    out: str
    """Folder, absolute, or URL of the shards."""
    manifest: Path
    """The manifest to write."""
    size: int = 2**30
    """Bytes of a shard at most, unless a single video is larger."""

    def __post_init__(self) -> None:
        if not _LEAST <= self.size <= _MOST:
            raise DataError(f"--size {self.size}: expected 64 KiB to 4 TiB")
        if is_url(self.out):
            check_url(f"{self.out.rstrip('/')}/shard")
        elif Path(self.out).resolve().is_relative_to(self.results.resolve()):
            raise DataError(
                f"--out {printable(self.out)}: the command deletes the shards in "
                f"{printable(self.results)} at its end; give another --out"
            )

    @property
    def results(self) -> Path:
        """The folder of what is known of each shard, until the manifest is written."""
        return self.manifest.with_suffix(".shards")


@dataclass(frozen=True)
class ShardReport:
    """What was written."""

    manifest: Manifest
    shards: int
    bytes: int
    """Of all shards."""
    indexed: int
    """Videos with a packet index."""
    bad: Findings
    """Rows that are in no shard."""


def parse_size(text: str) -> int:
    """Bytes: `1GiB`, `500 MB`, `4096`. Raises DataError."""
    found = _SIZES.fullmatch(text.strip())
    if not found:
        raise DataError(f"--size {text}: expected a size, such as 1GiB or 500MB")
    unit = found[2].lower()
    power = " kmgt".index(unit[0]) if unit else 0
    return int(float(found[1]) * (1024 if unit.endswith("i") else 1000) ** power)


def write_shards(
    source: Manifest,
    options: ShardOptions,
    *,
    workers: int,
    part: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
) -> int:
    """Write the shards that are missing; the same call continues an interrupted one.

    Nothing is written if the manifest is complete, and only the deletion of the folder of results was
    interrupted. Returns the number of shards of this part. Their bytes do not depend on workers, parts or
    interruptions.

    Args:
        workers: processes; each writes one shard at a time.
        part: (i, n): only the shards of number i modulo n.
        progress: called with the number of videos in finished shards, and of all of the part.

    Raises:
        DataError: the folder of results belongs to other shards, a source is in a folder of frames, or a
            shard cannot be written.
    """
    if (finished := _finished(source, options)) is not None:
        return len(range(part[0], finished.shards, part[1]))
    starts = _plan(source, options, workers)
    ends = [*starts[1:], len(source)]
    numbers = range(part[0], len(starts), part[1])
    total = sum(ends[number] - starts[number] for number in numbers)
    done = 0
    with tempfile.TemporaryDirectory() as folder:
        running = Path(folder, "running")
        running.touch()

        def job(number: int) -> ShardJob:
            rows = range(starts[number], ends[number])
            return ShardJob(source.path, number, rows, options.out, options.results, running)

        with closing(
            ordered_map(
                write_shard,
                map(job, numbers),
                total=len(numbers),
                workers=workers,
                on_crash=lambda _: None,
                chunk=1,
            )
        ) as results:
            try:
                for number, result in zip(numbers, results, strict=True):
                    if result is None:
                        write_isolated(job(number))
                    done += ends[number] - starts[number]
                    if progress is not None:
                        progress(done, total)
            finally:
                running.unlink()  # workers stop at their next video
    return len(numbers)


def write_isolated(job: ShardJob, examine: Examine = examine) -> ShardResult:
    """`write_shard` for a shard with a video that crashes the process that examines it: it is left out."""
    with IsolatedProcess() as process:

        def examine_isolated(content: VideoContent) -> tuple[VideoInfo, bytes]:
            try:
                return process.call(examine, content)
            except BrokenProcessPool as error:
                raise VideoError(CRASHES) from error

        return write_shard(job, examine_isolated)


def finish_shards(source: Manifest, options: ShardOptions) -> ShardReport:
    """Write the manifest and the packet indexes of all shards, and delete the folder of results.

    Raises DataError if shards are missing, or no video could be used.
    """
    if (finished := _finished(source, options)) is not None:
        _remove_results(options)
        return finished
    starts = _plan(source, options, 1)
    left_out: list[tuple[int, str]] = []
    totals = [0, 0]
    folder = options.manifest.absolute().parent

    def rows(table: PacketTableWriter) -> Iterator[ManifestRow]:
        for number in range(len(starts)):
            result = read_result(options.results, number)
            if result is None:
                raise DataError(
                    f"shard {number} of {len(starts)} is missing; run the same command again, or its --part"
                )
            location = location_of(options.out, number)
            path = location if is_url(location) else stored_path(Path(location), folder)
            left_out.extend(result.bad)
            totals[0] += result.size
            before = -1
            for video in result.videos:
                totals[1] += (
                    table.repeat(table.rows - 1) if video.offset == before else table.add(video.packets)
                )
                before = video.offset
                yield replace(source.row(video.row), path=path, offset=video.offset, length=video.length)
        if not table.rows:
            raise DataError("no video could be used:\n" + "\n".join(_findings(source, left_out).table()))

    try:
        with write_packet_table(options.manifest) as table:
            manifest = write_manifest(
                options.manifest,
                rows(table),
                source.class_names,
                weighted=source.weighted,
                sources=source.has_sources,
            )
            table.finish(manifest.fingerprint)
    except OSError as error:
        raise DataError(f"{printable(options.manifest)} cannot be written: {error.strerror}") from error
    record = {
        "fingerprint": manifest.fingerprint,
        "shards": len(starts),
        "bytes": totals[0],
        "indexed": totals[1],
        "bad": left_out,
    }
    _remove_results(options, {**_settings(source, options), "finished": record})
    bad = _findings(source, left_out)
    return ShardReport(Manifest.open(options.manifest), len(starts), totals[0], totals[1], bad)


def _findings(source: Manifest, left_out: Iterable[tuple[int, str]]) -> Findings:
    """The rows that are in no shard, with their reasons."""
    bad = Findings()
    for row, reason in left_out:
        bad.add(LEFT_OUT, source.printable_path(row), printable(reason))
    return bad


def _finished(source: Manifest, options: ShardOptions) -> ShardReport | None:
    """The report of a call that wrote the manifest, but not deleted the results; None if there was none."""
    try:
        settings = json.loads((options.results / SETTINGS).read_text(encoding="utf-8"))
        finished = settings.pop("finished")
        manifest = Manifest.open(options.manifest)
        if settings != _settings(source, options) or manifest.fingerprint != finished["fingerprint"]:
            return None
        bad = _findings(source, finished["bad"])
        return ShardReport(manifest, finished["shards"], finished["bytes"], finished["indexed"], bad)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, DataError):
        return None  # what is wrong with the settings is found where they are compared


def _remove_results(options: ShardOptions, settings: Mapping[str, object] | None = None) -> None:
    """Delete all files of the program, and the folder if nothing else is in it.

    The settings go last. Before, `settings` are written, with which an interrupted deletion is continued.

    Raises DataError.
    """
    folder = options.results
    try:
        if settings is not None:
            _write_settings(folder / SETTINGS, settings)
        for pattern in (".*.partial", "shard-*.tar", "[0-9]*.arrow", _PLAN, SETTINGS):
            for path in folder.glob(pattern):
                path.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"{printable(options.manifest)} is complete, but {printable(folder)} cannot be deleted: "
            f"{error.strerror}; delete it"
        ) from error
    with suppress(OSError):  # it holds other files
        folder.rmdir()


def _plan(source: Manifest, options: ShardOptions, workers: int) -> list[int]:
    """The first row of each shard. Computed once, then read from the folder of results.

    Raises DataError if the folder belongs to other shards.
    """
    _check_settings(source, options)
    path = options.results / _PLAN
    if not path.exists():
        starts = _first_rows(source, options.size, workers)
        with atomic_file(path, sync=True, shared=True) as partial, partial.open("wb") as file:
            np.save(file, np.array(starts, np.int64), allow_pickle=False)
    return [int(start) for start in np.load(path, allow_pickle=False)]


def _first_rows(source: Manifest, size: int, workers: int) -> array[int]:
    """The first row of each shard: as many videos in their order as fit into `size` bytes.

    A video of several consecutive rows is counted once, and its rows stay together.
    """
    starts = array("q", [0])
    used, before = 0, None
    chunks = range(0, len(source), _ROWS_AT_ONCE)
    with closing(
        ordered_map(
            partial(_sizes, source.path),
            chunks,
            total=len(chunks),
            workers=workers,
        )
    ) as results:
        for first, sizes in zip(chunks, results, strict=True):
            for inside, (video, length) in enumerate(sizes):
                if video == before:
                    continue
                before = video
                needed = length + -length % BLOCK + _PER_SAMPLE
                if used and used + needed > size:
                    starts.append(first + inside)
                    used = 0
                used += needed
    if len(starts) > MOST_SHARDS:
        raise DataError(
            f"{len(starts)} shards; choose a larger --size, so that there are at most {MOST_SHARDS}"
        )
    return starts


def _sizes(manifest: Path, first: int) -> list[tuple[tuple[str, int, int], int]]:
    """The video of each of some rows, and its bytes; 0 where it cannot be read.

    Raises DataError for a folder of frames.
    """
    opened = Manifest.open(manifest)
    found = []
    for index in range(first, min(first + _ROWS_AT_ONCE, len(opened))):
        try:
            row = opened.row(index)
            if row.source:
                raise DataError(
                    f"{opened.printable_path(index)} is a folder of frames, but shards hold video files: "
                    "transcode the manifest first"
                )
            found.append((row.video, row_content(opened.path_at(index), row).size))
        except VideoError:
            found.append((("", index, 0), 0))
    return found


def _check_settings(source: Manifest, options: ShardOptions) -> None:
    """Record what the folder of results belongs to, or compare it with what was recorded before."""
    settings = _settings(source, options)
    path = options.results / SETTINGS
    try:
        if not path.exists():
            _check_no_shards(options.out, path)
        options.results.mkdir(parents=True, exist_ok=True)
        if not is_url(options.out):
            Path(options.out).mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _write_settings(path, settings)
            return
        before = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{printable(options.results)} cannot be written: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{printable(path)}: no JSON: {error}; delete the folder") from error
    known = before if isinstance(before, dict) else {}
    known.pop("finished", None)  # of a manifest that is no longer there
    if known != settings:
        changed = ", ".join(name for name in settings if known.get(name) != settings[name])
        raise DataError(
            f"{printable(options.results)} belongs to shards with another {changed}: give the same arguments "
            "to continue them, or delete the folder"
        )


def _settings(source: Manifest, options: ShardOptions) -> dict[str, object]:
    """What the shards depend on."""
    return {"manifest": source.fingerprint, "out": options.out, "size": options.size}


def _write_settings(path: Path, settings: Mapping[str, object]) -> None:
    with atomic_file(path, sync=True, shared=True) as new:
        new.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def _check_no_shards(out: str, settings: Path) -> None:
    """Raises DataError if `out` has shards already, unless another part has written `settings` meanwhile."""
    first = location_of(out, 0)
    if is_url(first):
        try:
            object_size(first)
            found = True
        except VideoError:
            found = False
    else:
        found = any(Path(out).glob("shard-*.tar"))
    if found and not settings.exists():
        raise DataError(f"{printable(out)} holds shards already; give another --out, or delete them")
