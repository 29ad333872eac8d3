"""Copies of one video under several names, by size and parts of the content."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.dataset.manifest import Manifest, ManifestRow
from pipelines.dataset.prepare.duplicates import groups
from pipelines.dataset.prepare.verify import row_hashes
from pipelines.dataset.source import open_source
from pipelines.errors import DataError, VideoError
from pipelines.worker_pool import Progress, ordered_map

_SHAPE = ("frames", "width", "height", "codec", "fps", "length")
"""The columns that copies of a whole video share."""


@dataclass(frozen=True)
class Copies:
    """What was found among the videos that were compared."""

    videos: int = 0
    """Videos of the manifest, each once."""
    candidates: int = 0
    """Those with the same frames, size, codec, rate and bytes in a shard as another."""
    compared: int = 0
    """Candidates whose content was compared."""
    found: list[list[int]] = field(default_factory=list)
    """Rows that are copies of one video, one row for each file or byte range."""

    @property
    def number(self) -> int:
        """Videos that are a copy of an earlier one."""
        return sum(len(group) - 1 for group in self.found)


def find_copies(manifest: Manifest, most: int, *, workers: int, progress: Progress | None = None) -> Copies:
    """Find copies among at most `most` videos: those that fewest others resemble by their row come first.

    Two videos count as copies if `VideoSource.content_key` is the same: of files, their size and 48 KiB of
    their content. Memory: at most 66 bytes a row, measured with a million rows.

    Args:
        workers: processes.
        progress: called after each video with the number of those compared and of all.
    """
    videos, shapes = _first_rows(manifest)
    candidates = _candidates(shapes)
    chosen = videos[candidates[:most]]
    jobs = ((manifest.path_at(index), manifest.row(index)) for index in chosen.tolist())
    keys = array("Q")
    with closing(
        ordered_map(_key, jobs, total=len(chosen), workers=workers, progress=progress, on_crash=lambda _: 0)
    ) as found:
        keys.extend(found)
    return Copies(
        len(videos),
        len(candidates),
        len(chosen),
        [sorted(chosen[group].tolist()) for group in groups(np.frombuffer(keys, np.uint64))],
    )


def _first_rows(manifest: Manifest) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first valid row of each video, and a hash of what copies of it share."""
    numbers, shapes, identities = array("q"), array("q"), array("q")
    for first, valid, batch in _batches(manifest):
        numbers.extend((first + np.flatnonzero(valid)).tolist())
        segments = "video_frames" in batch.schema.names
        columns = ("video_frames" if segments else "frames", *_SHAPE[1:])
        own = row_hashes(batch, columns)
        if segments:  # a whole video has its number of frames elsewhere
            whole = np.asarray(batch["video_frames"]) == 0
            own = np.where(whole, row_hashes(batch, _SHAPE), own)
        shapes.frombytes(own[valid].tobytes())
        identities.frombytes(row_hashes(batch, ("path", "offset"))[valid].tobytes())
    _, kept = np.unique(np.frombuffer(identities, np.int64), return_index=True)
    kept.sort()
    return np.frombuffer(numbers, np.int64)[kept], np.frombuffer(shapes, np.int64)[kept]


def _candidates(shapes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The indices of each shape that occurs more than once and is not 0: the rarest first."""
    order = np.argsort(shapes, kind="stable")
    ordered = shapes[order]
    begins = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] + 1))
    sizes = np.diff(begins, append=len(ordered))
    repeated = (sizes > 1) & (ordered[begins] != 0)
    del ordered
    begins, sizes = begins[repeated], sizes[repeated]
    ranked = np.lexsort((order[begins], sizes))
    begins, sizes = begins[ranked], sizes[ranked]
    inside = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    inside += np.repeat(begins, sizes)
    return order[inside]


def _batches(manifest: Manifest) -> Iterator[tuple[int, NDArray[np.bool_], pa.RecordBatch]]:
    """First row, which rows are valid, and the record batch; without those that are damaged."""
    for number in range(manifest.num_batches):
        first = number * manifest.rows_per_batch
        try:
            wrong = [row - first for row, _, _ in manifest.row_problems(number)]
            batch = manifest.read_batch(number)
        except DataError:
            continue  # listed by the verification
        valid = np.ones(batch.num_rows, bool)
        valid[wrong] = False
        yield first, valid, batch


def _key(job: tuple[Path, ManifestRow]) -> int:
    try:
        return open_source(*job).content_key()
    except VideoError:
        return 0
