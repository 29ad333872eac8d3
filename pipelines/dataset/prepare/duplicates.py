"""Videos that occur more than once: within a manifest, and in other manifests of its folder."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.dataset.manifest import Manifest, ManifestRow
from pipelines.dataset.prepare.class_names import printable_class
from pipelines.dataset.prepare.findings import Findings
from pipelines.dataset.prepare.listing import Listing
from pipelines.dataset.prepare.summary import ManifestReport
from pipelines.dataset.source import open_source
from pipelines.dataset.split_overlap import MOST_LINKS, FileKeys
from pipelines.errors import DataError, VideoError
from pipelines.formatting import format_list, printable
from pipelines.worker_pool import Progress, ProgressOf, ordered_map

_FEW = 2000
"""Below this number of videos, one process computes all keys before worker processes would have started."""

MOST_READ = 100_000
"""Most videos of another manifest that are read to compare their content."""

MOST_HELD = 2_000_000
"""Most keys of file positions that are kept in memory."""

_GROUP = 32
"""Record batches that are compared in one call."""

_SHOWN_COPIES = 4
"""Copies of one video that a line of the report names."""

_NAMED_SIBLINGS = 5
"""Manifests of the folder for which shared videos are counted separately."""

_NOT_COMPARED = "other manifests of the folder that could not be compared"

TWO_LABELS = "videos that occur with two or more labels"
UNREADABLE = "other manifests with videos that could not be read and compared by content"
TWICE = "videos that occur more than once, with one label"


def add_duplicates(listing: Listing, keys: array[int], findings: Findings) -> None:
    """Add the videos that occur more than once to the findings.

    Args:
        keys: the content key of each video of the listing; 0 if it is not in the manifest.
    """
    for group in groups(np.frombuffer(keys, np.uint64)):
        labels = [listing.labels[index] for index in group]
        other = next((place for place, label in enumerate(labels) if label != labels[0]), 1)
        kind = TWICE if labels[other] == labels[0] else TWO_LABELS
        names = [_name(listing, index) for index in group[: _SHOWN_COPIES + 1]]
        more = f" and {len(group) - len(names)} more" if len(group) > len(names) else ""
        rest = f" and {len(group) - 2} more" if len(group) > 2 else ""
        findings.count(kind, f"{names[0]}\n  = {_name(listing, group[other])}{rest}")
        findings.line(Path(listing.paths[group[0]]), f"{kind}: {' = '.join(names)}{more}")


def groups(keys: np.ndarray) -> Iterator[list[int]]:
    """The indices of each key that occurs more than once and is not 0, ordered by the first index."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    begins = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] + 1))
    sizes = np.diff(begins, append=len(ordered))
    repeated = (sizes > 1) & (ordered[begins] != 0)
    begins, sizes = begins[repeated], sizes[repeated]
    for group in np.argsort(order[begins]).tolist():
        begin = begins[group]
        yield order[begin : begin + sizes[group]].tolist()


def _name(listing: Listing, index: int) -> str:
    """Path, class and line of a video."""
    name = printable_class(listing.class_names[listing.labels[index]])
    line = f", line {listing.lines[index]}" if listing.lines is not None else ""
    return f"{printable(Path(listing.paths[index]))} ({name}{line})"


def compare_with_other_manifests(report: ManifestReport, *, workers: int, progress_of: ProgressOf) -> None:
    """Add the videos that are also in other manifests of the folder to the report's findings.

    workers: as for `build_manifest`.
    """
    manifest, findings = report.manifest, report.findings
    others: list[Manifest] = []
    for path in _other_manifests(manifest.path):
        kind = printable(path.name) if len(others) < _NAMED_SIBLINGS else "further manifests of the folder"
        try:
            other = Manifest.open(path)
            if len(other) == 0:
                continue
            with progress_of(f"comparing with {printable(path.name)}") as progress:
                _compare(report, other, f"videos that are also in {kind}", workers, progress)
        except DataError as error:
            findings.count(_NOT_COMPARED, printable(str(error)))  # the message names the file
            findings.line(path, printable(f"not compared: {error}"))
        else:
            others.append(other)
    different = [
        printable(other.path.name)
        for other in others
        if other.class_names != manifest.class_names and set(other.class_names) & set(manifest.class_names)
    ]
    if different:
        findings.note(
            f"{format_list(different, _NAMED_SIBLINGS)}: the classes or their order differ. A run needs "
            "manifests with the same classes; `folder` and `table` take them from --classes FILE."
        )
    report.write_lists()


def _other_manifests(out: Path) -> list[Path]:
    """The other manifests in the folder of the manifest `out`."""
    return sorted(
        path
        for path in out.absolute().parent.iterdir()
        if path.suffix in (".arrow", out.suffix or ".arrow")
        and path.name != out.name
        and not path.name.startswith(".")
    )


def _compare(report: ManifestReport, other: Manifest, kind: str, workers: int, progress: Progress) -> None:
    """Add the videos of a manifest that are also in another manifest to the findings of its report.

    First compares the paths and offsets in the two manifests, then the content of at most `MOST_READ` evenly
    spaced videos of the other manifest.

    Args:
        kind: the kind of finding.
        progress: called with the compared rows and videos of the other manifest, and the number of all.

    Raises:
        DataError: the other manifest is damaged or a row is invalid; if it has more than `MOST_READ` rows,
            only rows that are read are checked.
    """
    manifest, keys, findings = report.manifest, report.keys, report.findings
    if len(other) <= MOST_READ:
        other.verify()
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    shared = np.zeros(len(keys), bool)

    def first_like(key: int, default: int | None = None) -> int | None:
        """The first row of the manifest with this content key, which is not 0; `default` if there is none."""
        place = int(np.searchsorted(ordered, np.uint64(key)))
        return int(order[place]) if key and place < len(ordered) and ordered[place] == key else default

    def add(ours: int | None, theirs: int, *, same: bool) -> None:
        if ours is None or shared[ours]:
            return
        shared[ours] = True
        row, other_row = manifest.row(ours), _row(other, theirs)
        path, copy = manifest.printable_path(ours), other.printable_path(theirs)
        here = printable_class(manifest.class_names[row.label])
        there = printable_class(other.class_names[other_row.label])
        text = "the same file" if same or path == copy else copy
        text += f" (here {here}, there {there})" if here != there else ""
        findings.count(kind, f"{path}\n  = {text}")
        findings.line(path, f"also in {printable(other.path.name)}: {text}")

    compared = range(0, len(other), -(-len(other) // MOST_READ) or 1)

    total = len(other) + len(compared)
    for ours, theirs in _same_files(manifest, other, findings, lambda done: progress(done, total)):
        add(first_like(int(keys[ours]), ours), theirs, same=True)
    rows = (_row(other, number) for number in compared)
    jobs = ((other.absolute_path(row), row) for row in rows)
    unreadable = 0
    with closing(
        ordered_map(
            _key_of_row,
            jobs,
            total=len(compared),
            workers=workers if len(compared) >= _FEW else 1,
            progress=lambda done, _: progress(len(other) + done, total),
        )
    ) as found:
        for number, key in zip(compared, found, strict=True):
            unreadable += not key
            add(first_like(key), number, same=False)
    if unreadable:
        findings.count(UNREADABLE, f"{printable(other.path)}: {unreadable} videos")
        findings.line(other.path, f"{unreadable} of its videos could not be read and compared by content")
    if len(compared) < len(other):
        findings.note(
            f"The content of {len(compared):,} of {len(other):,} videos of {printable(other.path)} was "
            "compared; copies of the others under another path are not found."
        )


def _same_files(
    manifest: Manifest, other: Manifest, findings: Findings, report: Callable[[int], None]
) -> Iterator[tuple[int, int]]:
    """Pairs of a row of the manifest and a row of the other one that are at the same offset of the same file.

    At most `MOST_HELD` keys of the smaller manifest are kept in memory; the larger one is read batch by
    batch.
    """
    files = FileKeys(follow=max(len(manifest), len(other)) <= MOST_LINKS)
    swapped = len(manifest) > len(other)
    held, streamed = (other, manifest) if swapped else (manifest, other)
    batches_held = max(1, MOST_HELD // held.rows_per_batch)
    every = max(1, -(-held.num_batches // batches_held))
    parts = [files.keys(batch, held.folder) for batch in held.batch_slices(every=every)]
    value_set = pa.chunked_array(parts, pa.binary())
    if every > 1:
        findings.note(
            f"The paths of {len(value_set):,} of {len(held):,} videos of {printable(held.path)} were "
            "compared."
        )
    begin = 0
    batches = streamed.batch_slices()
    # Several batches in one call: each call builds a hash table of the keys held.
    while group := list(islice(batches, _GROUP)):
        keys = pa.chunked_array([files.keys(batch, streamed.folder) for batch in group], pa.binary())
        found = pc.fill_null(pc.index_in(keys, value_set=value_set), -1).to_numpy()
        for inside in np.flatnonzero(found >= 0).tolist():
            number, rest = divmod(int(found[inside]), held.rows_per_batch)
            pair = (number * every * held.rows_per_batch + rest, begin + inside)
            yield (pair[1], pair[0]) if swapped else pair
        begin += len(keys)
        report(begin * len(other) // len(streamed))


def _row(manifest: Manifest, number: int) -> ManifestRow:
    try:
        return manifest.row(number)
    except VideoError as defect:
        raise DataError(
            f"{printable(manifest.path)}: row {number}, {manifest.printable_path(number)}, {defect}."
        ) from defect


def _key_of_row(job: tuple[Path, ManifestRow]) -> int:
    return open_source(*job).content_key()
