"""Weights from the number of videos of each class, so that rare classes are drawn more often."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.dataset.manifest import Manifest, encode_path, write_columns
from pipelines.errors import DataError
from pipelines.formatting import printable


def balance(source: Path, out: Path, power: float) -> Manifest:
    """Write the manifest `source` to `out`, each row with the weight count(its class) ** -power.

    A class of n videos is drawn in proportion to n ** (1 - power): with power 0 as often as it occurs, with 1
    all classes equally often, with 0.5 by the square root. Weights of `source` are ignored. Memory is bounded
    by one record batch; `out` may be `source`.

    Raises:
        DataError: `source` does not exist, is empty or damaged, or the power is negative or not a number.
    """
    if not (math.isfinite(power) and power >= 0):
        raise DataError(
            f"--power {power:g}: give a number from 0 (classes as often as they occur); 1 is all equally"
        )
    manifest = Manifest.open(source)
    if len(manifest) == 0:
        raise DataError(f"{printable(manifest.path)} has no video, so there is nothing to balance")
    manifest.verify()
    counts = np.zeros(len(manifest.class_names), np.int64)
    for batch in manifest.record_batches():
        counts += np.bincount(np.asarray(batch["label"], np.int32), minlength=len(counts))
    weights = np.maximum(counts, 1) ** -float(power)  # an empty class has no row
    return write_columns(out, _weighted(manifest, out.absolute().parent, weights), manifest.class_names)


def _weighted(manifest: Manifest, folder: Path, weights: np.ndarray) -> Iterator[pa.RecordBatch]:
    """The manifest's rows, for a manifest in `folder`, with the weight of their class."""
    here = manifest.path.parent
    for batch in manifest.record_batches():
        paths = batch["path"] if folder == here else _moved(batch["path"], here, folder)
        columns = {name: batch[name] for name in batch.schema.names}
        columns |= {"path": paths, "weight": pa.array(weights[np.from_dlpack(batch["label"])])}
        yield pa.RecordBatch.from_pydict(columns)


def _moved(paths: pa.Array, here: Path, folder: Path) -> pa.Array:
    """Paths of a manifest in `here` for one in `folder`: relative if below `folder`, otherwise absolute."""
    begins = [encode_path(place).rstrip("/") + "/" for place in (here, folder)]
    joined = pc.binary_join_element_wise(begins[0], paths, "")
    absolute = pc.if_else(pc.starts_with(paths, "/"), paths, joined)
    below = pc.utf8_slice_codeunits(absolute, len(begins[1]))
    return pc.if_else(pc.starts_with(absolute, begins[1]), below, absolute)
