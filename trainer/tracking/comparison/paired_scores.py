"""Scores per video: read, paired by video, and tested against those of a baseline."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import RunError
from trainer.evaluation.significance import PairedCounts, bootstrap_interval, count_pairs, holm, mcnemar
from trainer.system.files import parse_records
from trainer.tracking.comparison.runs import ComparedRun

_COLUMNS = ("row", "path", "label", "prediction")
_METADATA = b"uniformerv2"
_MOST_VIDEOS = 2**28
MOST_TESTED = 20
"""Runs that are tested against the baseline, the best ones: with more tests, each has less power."""


@dataclass(frozen=True)
class VideoScores:
    """A model's predictions for N videos."""

    rows: np.ndarray
    """(N,) manifest rows."""
    paths: np.ndarray
    """(N,) 64-bit digests of the paths."""
    labels: np.ndarray
    """(N,), -1 for no label."""
    predictions: np.ndarray
    """(N,) predicted classes, -1 for a video that could not be read."""
    about: dict[str, Any]
    """What was evaluated: `fingerprint`, `clips`, `crops`, `step` and more; empty where not recorded."""


@dataclass(frozen=True)
class PairedScores:
    """Counts of the videos of two files of scores."""

    counts: PairedCounts
    """Of the videos that both models could read, under the same label."""
    only_first: int
    """Videos in the first file alone."""
    only_second: int
    unread: int
    """Videos in both files, without a label or not read by one of the models."""
    other_label: int
    """Videos in both files, under different labels."""
    ambiguous: int
    """Videos of either file that share their path with another."""


def read_scores(path: Path) -> VideoScores:
    """Read the needed columns, one row group at a time; 28 bytes per video.

    Raises RunError for a damaged file and for one without scores.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            missing = [name for name in _COLUMNS if name not in file.schema_arrow.names]
            if missing:
                raise RunError(f"{path} has no column {', '.join(missing)}: it is not a file of scores")
            if file.metadata.num_rows > _MOST_VIDEOS:
                raise RunError(
                    f"{path} has {file.metadata.num_rows:,} rows; at most {_MOST_VIDEOS:,} are read"
                )
            parts = [
                _columns(file.read_row_group(number, columns=list(_COLUMNS)))
                for number in range(file.num_row_groups)
            ]
            metadata = (file.schema_arrow.metadata or {}).get(_METADATA, b"").decode(errors="replace")
            about = next(parse_records(metadata), {})
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


def pair(first: VideoScores, second: VideoScores) -> PairedScores:
    """Pair videos by row where both files have the same manifest fingerprint; else by path."""
    fingerprint = first.about.get("fingerprint")
    by_row = fingerprint is not None and fingerprint == second.about.get("fingerprint")
    keys = (first.rows, second.rows) if by_row else (first.paths, second.paths)
    (mine, my_positions), (theirs, their_positions) = (_unique(key) for key in keys)
    common, one, other = np.intersect1d(mine, theirs, assume_unique=True, return_indices=True)
    one, other = my_positions[one], their_positions[other]
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
    """The keys that occur once, and their positions."""
    values, positions, counts = np.unique(keys, return_index=True, return_counts=True)
    return values[counts == 1], positions[counts == 1]


@dataclass(frozen=True)
class PairedTest:
    """One run against the baseline."""

    run: int
    """Its index in the list of runs."""
    pairs: PairedScores
    """The baseline first."""
    low: float
    """Of the 95 % interval of the difference in top-1, run less baseline, 0..1."""
    high: float
    p: float
    """By McNemar's exact test."""
    adjusted: float
    """p, adjusted by Holm's method."""
    views: str | None
    """The views of both evaluations, where they differ."""


def read_all_scores(
    runs: Sequence[ComparedRun], indices: Iterable[int], notes: list[str]
) -> dict[int, VideoScores]:
    """The scores of those of the runs that have them, by index. Errors are appended to `notes`."""
    found = {}
    for index in indices:
        path = runs[index].find_scores()
        if path is None:
            continue
        try:
            found[index] = read_scores(path)
        except RunError as error:
            notes.append(str(error))
            continue
        last, step = runs[index].last, found[index].about.get("step")
        if last is not None and isinstance(step, int) and step != last.step:
            notes.append(
                f"Run {index + 1}: its scores per video are of step {step}, its last evaluation is of step "
                f"{last.step}"
            )
    return found


def paired_tests(scores: dict[int, VideoScores], base: int, notes: list[str]) -> list[PairedTest]:
    """A test for each run with scores of the baseline's videos; none where the baseline has no scores."""
    if base not in scores:
        return []
    compared = {index: pair(scores[base], own) for index, own in scores.items() if index != base}
    for index in [index for index, pairs in compared.items() if not pairs.counts.videos]:
        del compared[index]
        notes.append(f"Run {index + 1}: not tested, it has scores of none of the baseline's videos")
    p_values = [mcnemar(pairs.counts) for pairs in compared.values()]
    tests = []
    for (index, pairs), p, adjusted in zip(compared.items(), p_values, holm(p_values), strict=True):
        low, high = bootstrap_interval(pairs.counts)
        both = [
            f"{one.about.get('clips')} x {one.about.get('crops')}" for one in (scores[base], scores[index])
        ]
        views = " and ".join(both) if both[0] != both[1] else None
        tests.append(PairedTest(index, pairs, low, high, p, adjusted, views))
    return tests
