"""Which videos are the same: within a manifest, and in the manifests beside it."""

from __future__ import annotations

import hashlib
import os
import stat
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np

from pipelines import VideoDefect
from pipelines.datasets.findings import Findings
from pipelines.datasets.listing import Listing, shown_class
from pipelines.manifest import Manifest
from pipelines.parallel import ordered_map
from pipelines.paths import decode_path, printable

BLOCK = 16 * 1024
"""Bytes that are compared at the beginning, in the middle and at the end of a file."""

_FEW = 2000
"""Videos whose keys are read sooner than processes start."""

_SHOWN_COPIES = 4
"""Copies of one video that a line of the list names."""

TWO_LABELS = "videos that occur under two labels or more"
TWICE = "videos that occur twice or more, with one label"


def content_key(path: Path, offset: int = 0, length: int = 0) -> int:
    """A number that equal videos share: of size, first, middle and last bytes. 0: it cannot be read.

    Reads at most three blocks. Videos that differ have different numbers but for a chance of 2^-64, unless
    they differ only between the blocks, which compressed videos of one size hardly do.
    """
    try:
        with path.open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return 0
            size = length or status.st_size
            digest = hashlib.blake2b(str(size).encode(), digest_size=8)
            for begin in sorted({0, max(0, (size - BLOCK) // 2), max(0, size - BLOCK)}):
                file.seek(offset + begin)
                digest.update(file.read(min(BLOCK, size - begin)))
    except OSError:
        return 0
    return int.from_bytes(digest.digest(), "little") or 1


def say_duplicates(listing: Listing, keys: array[int], findings: Findings) -> None:
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
    name = shown_class(listing.class_names[label])
    line = f", line {listing.lines[index]}" if listing.lines is not None else ""
    return f"{printable(path)} ({name}{line})"


def siblings(out: Path) -> list[Path]:
    """The other manifests in the folder of the manifest `out`."""
    return sorted(
        path
        for path in out.absolute().parent.iterdir()
        if path.suffix in (".arrow", out.suffix or ".arrow")
        and path.name != out.name
        and not path.name.startswith(".")
    )


def compare_with(
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

    Args:
        keys: the content keys of the manifest's rows, in their order.
        kind: what they are counted by.
        progress: called after each video of the other manifest.

    Raises:
        DataError: a row of the other manifest is not valid.
    """
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    rows = map(there.row, range(len(there)))
    jobs = ((str(there.folder), row.path, row.offset, row.length) for row in rows)
    workers = workers if len(there) >= _FEW else 1
    unreadable = 0
    shared = np.zeros(len(keys), bool)
    with closing(
        ordered_map(_key_of_row, jobs, total=len(there), workers=workers, progress=progress)
    ) as found:
        for number, key in enumerate(found):
            if not key:
                unreadable += 1
                continue
            place = int(np.searchsorted(ordered, np.uint64(key)))
            if place == len(ordered) or ordered[place] != key or shared[order[place]]:
                continue
            shared[order[place]] = True
            here, row = manifest.row(int(order[place])), there.row(number)
            ours, theirs = manifest.absolute_path(here), there.absolute_path(row)
            labels = _class_of(manifest, here.label), _class_of(there, row.label)
            said = "the same file" if ours == theirs else printable(theirs)
            said += f" (here {labels[0]}, there {labels[1]})" if labels[0] != labels[1] else ""
            findings.count(kind, f"{printable(ours)}\n  = {said}")
            findings.line(ours, f"also in {printable(there.path.name)}: {said}")
    if unreadable:
        findings.note(
            f"{unreadable} videos of {printable(there.path)} could not be read, and were not compared."
        )


def _class_of(manifest: Manifest, label: int) -> str:
    names = manifest.class_names
    return shown_class(names[label]) if 0 <= label < len(names) else f"label {label}"


def _key_of_row(job: tuple[str, str, int, int]) -> int:
    folder, path, offset, length = job
    try:
        return content_key(Path(folder) / decode_path(path), offset, length)
    except VideoDefect:
        return 0
