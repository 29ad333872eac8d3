"""Manifests of millions of rows, made in seconds from a few real videos."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.dataset import manifest
from pipelines.dataset.manifest import Manifest, write_columns
from pipelines.dataset.prepare.build import stored_path


def make_big_manifest(path: Path, videos: Manifest, rows: int, *, weighted: bool = False) -> Manifest:
    """Write a manifest of `rows` rows that repeat the videos of `videos`.

    weighted: give the rows weights between 0.5 and 1.5. Memory is bounded by one record batch.
    """
    return write_columns(path, _batches(path.absolute().parent, videos, rows, weighted), videos.class_names)


def _batches(folder: Path, videos: Manifest, rows: int, weighted: bool) -> Iterator[pa.RecordBatch]:
    batch = next(videos.record_batches())
    columns = {name: batch[name] for name in batch.schema.names}
    paths = [stored_path(videos.absolute_path(videos.row(i)), folder) for i in range(batch.num_rows)]
    columns["path"] = pa.array(paths, pa.string())
    pattern = pa.RecordBatch.from_pydict(columns)
    rng = np.random.default_rng(0)
    for begin in range(0, rows, manifest.ROWS_PER_BATCH):
        count = min(manifest.ROWS_PER_BATCH, rows - begin)
        taken = pattern.take(pa.array((begin + np.arange(count)) % batch.num_rows))
        if weighted:
            taken = taken.append_column("weight", pa.array(rng.uniform(0.5, 1.5, count)))
        yield taken
