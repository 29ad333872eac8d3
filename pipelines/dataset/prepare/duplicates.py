"""Which videos are the same: within a manifest, and in the manifests beside it."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.dataset.manifest import Manifest, ManifestRow
from pipelines.dataset.paths import decode_path
from pipelines.dataset.prepare.class_names import printable_class
from pipelines.dataset.prepare.findings import Findings
from pipelines.dataset.prepare.listing import Listing
from pipelines.dataset.split_overlap import MOST_LINKS, FileKeys
from pipelines.decode.video_file import VideoFile
from pipelines.errors import DataError, VideoError
from pipelines.formatting import printable
from pipelines.worker_pool import ordered_map

BLOCK = 16 * 1024
"""Bytes that are compared at the beginning, in the middle and at the end of a file."""

_FEW = 2000
"""Videos whose keys are read sooner than processes start."""

MOST_READ = 100_000
"""Files of another manifest that are read to compare them by content."""

MOST_HELD = 2_000_000
"""Places of files that are held to compare them."""

_GROUP = 32
"""Record batches that are compared at a time."""

_SHOWN_COPIES = 4
"""Copies of one video that a line of the list names."""

TWO_LABELS = "videos that occur under two labels or more"
UNREADABLE = "other manifests with videos that could not be read, nor compared by content"
TWICE = "videos that occur twice or more, with one label"


def content_key(path: Path, offset: int = 0, length: int = 0) -> int:
    """A number that equal videos share: of size, first, middle and last bytes. 0: it cannot be read.

    Reads at most three blocks. Videos that differ have different numbers but for a chance of 2^-64, unless
    they differ only between the blocks, which compressed videos of one size hardly do.
    """
    try:
        with VideoFile(path) as file:
            size = length or file.size
            digest = hashlib.blake2b(str(size).encode(), digest_size=8)
            for begin in sorted({0, max(0, (size - BLOCK) // 2), max(0, size - BLOCK)}):
                file.seek(offset + begin)
                digest.update(file.read(min(BLOCK, size - begin)))
    except (OSError, VideoError):
        return 0
    return int.from_bytes(digest.digest(), "little") or 1


def add_duplicates(listing: Listing, keys: array[int], findings: Findings) -> None:
    """Add the videos that occur more than once to the findings.

    Args:
        keys: the content key of each video of the listing, 0 where it is not in the manifest.
    """
    for group in _groups(np.frombuffer(keys, np.uint64)):
        labels = [listing.videos[index][1] for index in group]
        other = next((place for place, label in enumerate(labels) if label != labels[0]), 1)
        kind = TWICE if labels[other] == labels[0] else TWO_LABELS
        places = [_place(listing, index) for index in group[: _SHOWN_COPIES + 1]]
        more = f" and {len(group) - 1 - _SHOWN_COPIES} more" if len(group) > _SHOWN_COPIES + 1 else ""
        rest = f" and {len(group) - 2} more" if len(group) > 2 else ""
        findings.count(kind, f"{places[0]}\n  = {_place(listing, group[other])}{rest}")
        findings.line(listing.videos[group[0]][0], f"{kind}: {' = '.join(places)}{more}")


def _groups(keys: np.ndarray) -> Iterator[list[int]]:
    """The indices of equal keys that are not 0, in the order of the first of each group."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    begins = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] + np.uint64(1)))
    sizes = np.diff(begins, append=len(ordered))
    repeated = (sizes > 1) & (ordered[begins] != 0)
    found = sorted(zip(order[begins[repeated]], begins[repeated], sizes[repeated], strict=True))
    for _, begin, size in found:
        yield [int(index) for index in order[begin : begin + size]]


def _place(listing: Listing, index: int) -> str:
    path, label = listing.videos[index]
    name = printable_class(listing.class_names[label])
    line = f", line {listing.lines[index]}" if listing.lines is not None else ""
    return f"{printable(path)} ({name}{line})"


def other_manifests(out: Path) -> list[Path]:
    """The other manifests in the folder of the manifest `out`."""
    return sorted(
        path
        for path in out.absolute().parent.iterdir()
        if path.suffix in (".arrow", out.suffix or ".arrow")
        and path.name != out.name
        and not path.name.startswith(".")
    )


def compare_manifests(
    manifest: Manifest,
    keys: np.ndarray,
    there: Manifest,
    findings: Findings,
    kind: str,
    *,
    workers: int,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Add the videos of a manifest that are also in another one to the findings.

    Where files are is compared first, which the manifests alone tell, then the content of files of the other
    one, at most `MOST_READ` of them, evenly over it.

    Args:
        keys: the content keys of the manifest's rows, in their order.
        kind: what they are counted by.
        progress: called with what was done, in rows and files of the other manifest, and all that is to do.

    Raises:
        DataError: the other manifest is damaged or a row is not valid; of a larger one, a row that is looked
            at.
    """
    if len(there) <= MOST_READ:
        there.verify()
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    shared = np.zeros(len(keys), bool)

    def first_like(key: int) -> int | None:
        """The first row with this content."""
        place = int(np.searchsorted(ordered, np.uint64(key)))
        return int(order[place]) if place < len(ordered) and ordered[place] == key else None

    def add(ours: int, theirs: int, *, same: bool) -> None:
        here, row = manifest.row(ours), _row(there, theirs)
        path, other = manifest.absolute_path(here), there.absolute_path(row)
        labels = _class_of(manifest, here.label), _class_of(there, row.label)
        said = "the same file" if same or path == other else printable(other)
        said += f" (here {labels[0]}, there {labels[1]})" if labels[0] != labels[1] else ""
        findings.count(kind, f"{printable(path)}\n  = {said}")
        findings.line(path, f"also in {printable(there.path.name)}: {said}")

    looked_at = range(0, len(there), -(-len(there) // MOST_READ) or 1)
    total = len(there) + len(looked_at)

    def told(done: int) -> None:
        if progress is not None:
            progress(done, total)

    for ours, theirs in _same_files(manifest, there, findings, told):
        first = first_like(int(keys[ours]))
        first = ours if first is None or not keys[ours] else first
        if not shared[first]:
            shared[first] = True
            add(ours, theirs, same=True)
    rows = (_row(there, number) for number in looked_at)
    jobs = ((str(there.folder), row.path, row.offset, row.length) for row in rows)
    unreadable = 0
    with closing(
        ordered_map(
            _key_of_row,
            jobs,
            total=len(looked_at),
            workers=workers if len(looked_at) >= _FEW else 1,
            progress=lambda done, _: told(len(there) + done),
        )
    ) as found:
        for number, key in zip(looked_at, found, strict=True):
            unreadable += not key
            place = first_like(key) if key else None
            if place is not None and not shared[place]:
                shared[place] = True
                add(place, number, same=False)
    if unreadable:
        findings.count(UNREADABLE, f"{printable(there.path)}: {unreadable} videos")
        findings.line(there.path, f"{unreadable} of its videos could not be read, nor compared by content")
    if len(looked_at) < len(there):
        findings.note(
            f"{len(looked_at):,} of {len(there):,} videos of {printable(there.path)} were compared by "
            "content, evenly over it; copies of the others under another path are not seen."
        )


def _same_files(
    manifest: Manifest, there: Manifest, findings: Findings, told: Callable[[int], None]
) -> Iterator[tuple[int, int]]:
    """A row of the manifest, and one of another that is in the same file at the same offset.

    The keys of the smaller one are held, at most `MOST_HELD` of them, and the other one is gone through.
    """
    files = FileKeys(follow=max(len(manifest), len(there)) <= MOST_LINKS)
    swapped = len(manifest) > len(there)
    held, passed = (there, manifest) if swapped else (manifest, there)
    batches_held = max(1, MOST_HELD // held.rows_per_batch)
    every = max(1, -(-held.num_batches // batches_held))
    parts = [files.keys(batch, held.folder) for batch in held.batch_slices(every=every)]
    value_set = pa.chunked_array(parts, pa.binary())
    if every > 1:
        findings.note(
            f"Where files are was compared for {len(value_set):,} of {len(held):,} videos of "
            f"{printable(held.path)}."
        )
    begin = 0
    batches = passed.batch_slices()
    # Several batches in one call: each call builds a hash table of the keys held.
    while group := list(islice(batches, _GROUP)):
        keys = pa.chunked_array([files.keys(batch, passed.folder) for batch in group], pa.binary())
        found = pc.fill_null(pc.index_in(keys, value_set=value_set), -1).to_numpy()
        for inside in np.flatnonzero(found >= 0).tolist():
            number, rest = divmod(int(found[inside]), held.rows_per_batch)
            pair = (number * every * held.rows_per_batch + rest, begin + inside)
            yield (pair[1], pair[0]) if swapped else pair
        begin += len(keys)
        told(begin * len(there) // len(passed))


def _row(manifest: Manifest, number: int) -> ManifestRow:
    try:
        return manifest.row(number)
    except VideoError as defect:
        raise DataError(
            f"{printable(manifest.path)}: row {number}, {manifest.printable_path(number)}, {defect}."
        ) from defect


def _class_of(manifest: Manifest, label: int) -> str:
    names = manifest.class_names
    return printable_class(names[label]) if 0 <= label < len(names) else f"label {label}"


def _key_of_row(job: tuple[str, str, int, int]) -> int:
    folder, path, offset, length = job
    try:
        return content_key(Path(folder) / decode_path(path), offset, length)
    except VideoError:
        return 0
