"""Counts over all rows of a manifest, without its videos."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.dataset.manifest import Manifest
from pipelines.dataset.prepare.verify import Verification, verify_manifest
from pipelines.errors import DataError
from pipelines.worker_pool import Progress


@dataclass(frozen=True)
class Survey:
    """What the valid rows of a manifest say."""

    manifest: Manifest
    verification: Verification
    """What is wrong with the others, and repeated videos."""
    classes: NDArray[np.int64]
    """Rows of each class."""
    seconds: NDArray[np.float32]
    """Duration of each row whose frame rate is known."""
    frames: int
    """Of all rows."""
    sizes: Counter[tuple[int, int]]
    """Rows by width and height in pixels."""
    codecs: Counter[str]
    """Rows by FFmpeg's name of the codec."""

    @property
    def rows(self) -> int:
        """Valid rows."""
        return int(self.classes.sum())


def survey_manifest(manifest: Manifest, progress: Progress | None = None) -> Survey:
    """Read all rows. Memory: about 55 bytes a row.

    progress: called after each record batch with the rows read and of all.
    """
    verification = verify_manifest(manifest, progress=progress)
    classes = np.zeros(len(manifest.class_names), np.int64)
    seconds, frames = [np.zeros(0, np.float32)], 0
    sizes: Counter[tuple[int, int]] = Counter()
    codecs: Counter[str] = Counter()
    for number in range(manifest.num_batches):
        try:
            wrong = {row for row, _, _ in manifest.row_problems(number)}
            batch = manifest.read_batch(number)
        except DataError:
            continue  # listed by the verification
        first = number * manifest.rows_per_batch
        valid = np.ones(batch.num_rows, bool)
        valid[[row - first for row in wrong]] = False
        labels, counts, rates = (np.asarray(batch[name])[valid] for name in ("label", "frames", "fps"))
        classes += np.bincount(labels, minlength=len(classes))
        frames += int(counts.sum(dtype=np.int64))
        known = rates > 0
        seconds.append((counts[known] / rates[known]).astype(np.float32))
        packed = np.asarray(batch["width"])[valid].astype(np.int64) << 32 | np.asarray(batch["height"])[valid]
        for size, count in zip(*np.unique(packed, return_counts=True), strict=True):
            sizes[int(size) >> 32, int(size) & 0xFFFFFFFF] += int(count)
        for entry in pc.value_counts(batch["codec"].filter(valid)).to_pylist():
            codecs[entry["values"]] += entry["counts"]
    return Survey(manifest, verification, classes, np.concatenate(seconds), frames, sizes, codecs)
