"""Two models' scores on the same videos: read, paired, counted."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import RunError
from trainer.evaluation.significance import PairedCounts, count_pairs

_COLUMNS = ("row", "path", "label", "prediction")
_METADATA = b"uniformerv2"
_MOST_VIDEOS = 2**28


@dataclass(frozen=True)
class VideoScores:
    """Of N videos: manifest row, 64-bit digest of the path, label, predicted class (-1: not read)."""

    rows: np.ndarray
    paths: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    about: dict[str, Any]
    """What was evaluated: `fingerprint`, `clips`, `crops`, `step` and more; empty where it is not said."""


@dataclass(frozen=True)
class PairedScores:
    """counts: of the videos that both models were shown and could read, under the same label.

    only_first, only_second: videos in one file alone. unread: in both, and without a label, or not read by
    one of the models. other_label: in both, under different labels. ambiguous: videos of either file that
    cannot be told apart, as several with one path.
    """

    counts: PairedCounts
    only_first: int
    only_second: int
    unread: int
    other_label: int
    ambiguous: int


def read_scores(path: Path) -> VideoScores:
    """Read the columns that are needed, a row group at a time; 28 bytes a video.

    Raises RunError for a file that is none of ours or is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            missing = [name for name in _COLUMNS if name not in file.schema_arrow.names]
            if missing:
                raise RunError(f"{path} has no column {', '.join(missing)}: it is no file of scores")
            if file.metadata.num_rows > _MOST_VIDEOS:
                raise RunError(
                    f"{path} has {file.metadata.num_rows:,} rows; at most {_MOST_VIDEOS:,} are read"
                )
            parts = [
                _columns(file.read_row_group(number, columns=list(_COLUMNS)))
                for number in range(file.num_row_groups)
            ]
            about = _about(file.schema_arrow.metadata or {})
    except (OSError, pa.ArrowException, ValueError, OverflowError) as error:
        raise RunError(f"{path} cannot be read: {str(error).partition(chr(10))[0]}") from None
    none = (np.zeros(0, np.int64), np.zeros(0, np.uint64), np.zeros(0, np.int32), np.zeros(0, np.int32))
    rows, paths, labels, predictions = (np.concatenate(found) for found in zip(none, *parts, strict=True))
    return VideoScores(rows, paths, labels, predictions, about)


def _columns(table: Any) -> tuple[np.ndarray, ...]:
    rows = table["row"].cast("int64").fill_null(-1).to_numpy()
    labels = table["label"].cast("int64").fill_null(-1).to_numpy().astype(np.int32)
    predictions = table["prediction"].cast("int64").fill_null(-1).to_numpy().astype(np.int32)
    texts = (str(text).encode(errors="surrogatepass") for text in table["path"].cast("string").to_pylist())
    digests = (int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") for text in texts)
    return rows, np.fromiter(digests, np.uint64, len(rows)), labels, predictions


def _about(metadata: dict[bytes, bytes]) -> dict[str, Any]:
    try:
        found = json.loads(metadata.get(_METADATA, b"{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def pair(first: VideoScores, second: VideoScores) -> PairedScores:
    """By row where both are of one manifest, by its fingerprint; else by path."""
    fingerprint = first.about.get("fingerprint")
    by_row = fingerprint is not None and fingerprint == second.about.get("fingerprint")
    keys = (first.rows, second.rows) if by_row else (first.paths, second.paths)
    (mine, my_places), (theirs, their_places) = (_unique(key) for key in keys)
    common, one, other = np.intersect1d(mine, theirs, assume_unique=True, return_indices=True)
    one, other = my_places[one], their_places[other]
    same_label = first.labels[one] == second.labels[other]
    read = (first.labels[one] >= 0) & (first.predictions[one] >= 0) & (second.predictions[other] >= 0)
    kept = same_label & read
    labels = first.labels[one][kept]
    counts = count_pairs(first.predictions[one][kept] == labels, second.predictions[other][kept] == labels)
    return PairedScores(
        counts,
        only_first=mine.size - common.size,
        only_second=theirs.size - common.size,
        unread=int(np.count_nonzero(same_label & ~read)),
        other_label=int(np.count_nonzero(~same_label)),
        ambiguous=keys[0].size - mine.size + keys[1].size - theirs.size,
    )


def _unique(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The keys that occur once, and where."""
    values, places, counts = np.unique(keys, return_index=True, return_counts=True)
    return values[counts == 1], places[counts == 1]
