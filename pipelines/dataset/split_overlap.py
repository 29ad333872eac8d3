"""Videos that are in training and in validation: accuracy on them says little about new videos."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.dataset.concat import Dataset
from pipelines.dataset.manifest import Manifest
from pipelines.dataset.paths import decode_path
from pipelines.errors import VideoError
from pipelines.formatting import printable

MOST_ROWS = 500_000
"""Rows of each side that are compared; of more, a piece of each record batch."""

MOST_BATCHES = 2_000
"""Record batches of a manifest that are looked into; of more, evenly over it."""

MOST_LINKS = 10_000  # rows of each side whose own links are followed, which asks the file system of each
_MOST_FOLDERS = 20_000  # folders whose links are followed in one comparison
_NAMED = 3  # videos that a note names
_NAME_LENGTH = 80  # characters of a path that a note shows


@dataclass(frozen=True)
class Overlap:
    """What two datasets share.

    shared: rows of `val` that are in `train`, too. names: paths of the first of them. train_rows, val_rows:
    how many rows of each were compared.
    """

    shared: int
    names: tuple[str, ...]
    train_rows: int
    val_rows: int


def find_overlap(train: Dataset, val: Dataset, most: int = MOST_ROWS) -> Overlap:
    """The videos of `val` that are in `train`: the same file, links followed, at the same offset.

    Time and memory are bounded: of more than `most` rows, a sample of `most` is compared, and of files
    themselves links are followed in small datasets only.
    """
    files = FileKeys(follow=max(len(train), len(val)) <= MOST_LINKS)
    # One call for all keys of `val`: each call builds a hash table of those of `train`.
    train_keys = pa.chunked_array(list(_keys(train, most, files)), pa.binary())
    val_keys = pa.chunked_array(list(_keys(val, most, files)), pa.binary())
    found = val_keys.filter(pc.is_in(val_keys, value_set=train_keys))
    names = tuple(_shown(key) for key in islice(found, _NAMED))
    return Overlap(len(found), names, len(train_keys), len(val_keys))


def overlap_notes(train: Dataset, val: Dataset, most: int = MOST_ROWS) -> tuple[str, ...]:
    """A note for a run's first lines; none where all was compared and nothing is shared."""
    overlap = find_overlap(train, val, most)
    looked = ""
    if (overlap.train_rows, overlap.val_rows) != (len(train), len(val)):
        looked = (
            f" (compared were {overlap.val_rows:,} of {len(val):,} and {overlap.train_rows:,} of "
            f"{len(train):,} training videos)"
        )
    if not overlap.shared:
        return (f"no validation video was found in training{looked}",) if looked else ()
    rest = overlap.shared - len(overlap.names)
    more = f" and {rest:,} more" if rest else ""
    return (
        f"{overlap.shared:,} of {len(val):,} validation videos {'are' if overlap.shared > 1 else 'is'} in "
        f"training, too{looked}: {', '.join(overlap.names)}{more}. Accuracy on them says little about new "
        "videos; take them out of one of the manifests",
    )


def _keys(dataset: Dataset, most: int, files: "FileKeys") -> Iterator[pa.Array]:
    """Which file and where in it each row is, a record batch after the other."""
    for manifest in dataset.manifests:
        share = most * len(manifest) // max(1, len(dataset))
        for batch in _some(manifest, share if len(dataset) > most else len(manifest)):
            yield files.keys(batch, manifest.folder)


def _some(manifest: Manifest, most: int) -> Iterator[pa.RecordBatch]:
    """All record batches, or a piece of each or of some, with about `most` rows in all.

    Pieces, since what two manifests share is often one stretch of rows; and not single rows, since a piece is
    read from disk in one go.
    """
    every = max(1, -(-manifest.num_batches // MOST_BATCHES))
    step = max(1, -(-len(manifest) // (every * max(1, most))))
    return manifest.batch_slices(step, every)


class FileKeys:
    """Which file and where in it rows of manifests are. Each folder is looked up once.

    follow: follow links of files, too, which asks the file system of each; otherwise those of folders, and of
    no more folders than `_MOST_FOLDERS`.
    """

    def __init__(self, *, follow: bool) -> None:
        self._follow = follow
        self._folders: dict[bytes, bytes] = {}

    def keys(self, batch: pa.RecordBatch, folder: Path) -> pa.Array:
        """For each row of a record batch, in a manifest of `folder`, the path and the offset as bytes."""
        paths = batch["path"].cast(pa.binary())
        if self._follow:
            resolved = pa.array([_looked_up(folder, path, os.path.realpath) for path in paths], pa.binary())
        else:
            # A manifest has few folders for its rows.
            folders = pc.replace_substring_regex(paths, pattern="[^/]*$", replacement="").dictionary_encode()
            names = pc.replace_substring_regex(paths, pattern="^(?s:.*)/", replacement="")
            found = [_looked_up(folder, path, self._folder) for path in folders.dictionary]
            resolved = pc.binary_join_element_wise(
                pa.array(found, pa.binary()).take(folders.indices), names, b"/"
            )
        offsets = batch["offset"].cast(pa.string()).cast(pa.binary())
        return pc.binary_join_element_wise(resolved, offsets, b"\0")

    def _folder(self, path: bytes) -> bytes:
        found = self._folders.get(path)
        if found is None:
            if len(self._folders) >= _MOST_FOLDERS:
                return os.path.abspath(path)
            found = self._folders[path] = os.path.realpath(path)
        return found


def _looked_up(folder: Path, stored: pa.Scalar, lookup: Callable[[bytes], bytes]) -> bytes:
    """Where a stored path leads; a path that no file can have stays as it is."""
    text: bytes = stored.as_py()
    try:
        return lookup(os.path.join(os.fsencode(folder), os.fsencode(decode_path(text.decode()))))
    except (VideoError, ValueError):
        return text


def _shown(key: pa.Scalar) -> str:
    path, _, offset = key.as_py().rpartition(b"\0")
    text = printable(Path(os.fsdecode(path)))
    if len(text) > _NAME_LENGTH:
        text = f"...{text[-_NAME_LENGTH:]}"
    return text if offset == b"0" else f"{text} at byte {offset.decode()}"
