"""Videos that are both in the training and in the validation set, which makes accuracy too optimistic."""

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
from pipelines.formatting import format_list, printable
from pipelines.storage.object_store import is_url

MOST_ROWS = 500_000
"""Most rows of each dataset that are compared; of a larger one, a slice of each record batch."""

MOST_BATCHES = 2_000
"""Most record batches of a manifest that are read; of more, evenly spaced ones."""

MOST_LINKS = 10_000  # rows of a dataset up to which links of files are resolved, with a system call for each
_MOST_FOLDERS = 20_000  # folders whose links are resolved in one comparison
_NAMED = 3  # videos that a note names
_NAME_LENGTH = 80  # characters of a path that a note shows


@dataclass(frozen=True)
class Overlap:
    """What two datasets share."""

    shared: int
    """Rows of `val` that are also in `train`."""
    files: int
    """Different videos among them: several rows may be segments of one file."""
    names: tuple[str, ...]
    """Paths of the first of these."""
    train_rows: int
    """Rows of `train` that were compared."""
    val_rows: int
    """Rows of `val` that were compared."""


def find_overlap(train: Dataset, val: Dataset, most: int = MOST_ROWS) -> Overlap:
    """The videos of `val` that are in `train`: the same file, with links resolved, at the same offset.

    Time and memory are bounded: at most `most` rows of each dataset are compared, and links of files are
    resolved only in small datasets.
    """
    files = FileKeys(follow=max(len(train), len(val)) <= MOST_LINKS)
    # One call for all keys of `val`: each call builds a hash table of those of `train`.
    train_keys = pa.chunked_array(list(_keys(train, most, files)), pa.binary())
    val_keys = pa.chunked_array(list(_keys(val, most, files)), pa.binary())
    found = val_keys.filter(pc.is_in(val_keys, value_set=train_keys))
    different = found.unique()
    names = tuple(_printable_key(key) for key in islice(different, _NAMED))
    return Overlap(len(found), len(different), names, len(train_keys), len(val_keys))


def overlap_notes(train: Dataset, val: Dataset, most: int = MOST_ROWS) -> tuple[str, ...]:
    """A note for the first lines of a run; none if all rows were compared and nothing is shared."""
    overlap = find_overlap(train, val, most)
    compared = ""
    if (overlap.train_rows, overlap.val_rows) != (len(train), len(val)):
        compared = (
            f" (compared: {overlap.val_rows:,} of {len(val):,} validation videos and "
            f"{overlap.train_rows:,} of {len(train):,} training videos)"
        )
    if not overlap.shared:
        return (f"no validation video was found in training{compared}",) if compared else ()
    return (
        f"{overlap.shared:,} of {len(val):,} validation videos {'are' if overlap.shared > 1 else 'is'} also "
        f"in training{compared}: {format_list(overlap.names, _NAMED, overlap.files)}. Accuracy on them is "
        "too optimistic; remove them from one of the manifests",
    )


def _keys(dataset: Dataset, most: int, files: "FileKeys") -> Iterator[pa.Array]:
    """The keys of the compared rows (see `FileKeys.keys`), one array for each record batch."""
    for manifest in dataset.manifests:
        share = most * len(manifest) // max(1, len(dataset))
        for batch in _slices(manifest, share if len(dataset) > most else len(manifest)):
            yield files.keys(batch, manifest.folder)


def _slices(manifest: Manifest, most: int) -> Iterator[pa.RecordBatch]:
    """Slices of the record batches with about `most` rows in total.

    Slices of all parts of the manifest, because the rows that two manifests share are often adjacent; not
    single rows, because a slice is one read from disk.
    """
    every = max(1, -(-manifest.num_batches // MOST_BATCHES))
    step = max(1, -(-len(manifest) // (every * max(1, most))))
    return manifest.batch_slices(step, every)


class FileKeys:
    """Keys of rows that are equal if the rows are the same bytes of the same file. Caches resolved
    folders."""

    def __init__(self, *, follow: bool) -> None:
        """
        Args:
            follow: resolve links of files, with a system call for each; otherwise only links of folders, of
                at most `_MOST_FOLDERS` folders.
        """
        self._follow = follow
        self._folders: dict[bytes, bytes] = {}

    def keys(self, batch: pa.RecordBatch, folder: Path) -> pa.Array:
        """For each row of a record batch, of a manifest in `folder`: resolved path, NUL and offset, as
        bytes."""
        paths = batch["path"].cast(pa.binary())
        if self._follow:
            resolved = pa.array([_resolve(folder, path, os.path.realpath) for path in paths], pa.binary())
        else:
            # A manifest has far fewer folders than rows.
            folders = pc.replace_substring_regex(paths, pattern="[^/]*$", replacement="").dictionary_encode()
            names = pc.replace_substring_regex(paths, pattern="^(?s:.*)/", replacement="")
            found = [_resolve(folder, path, self._resolve_folder) for path in folders.dictionary]
            resolved = pc.binary_join_element_wise(
                pa.array(found, pa.binary()).take(folders.indices), names, b"/"
            )
        offsets = batch["offset"].cast(pa.string()).cast(pa.binary())
        return pc.binary_join_element_wise(resolved, offsets, b"\0")

    def _resolve_folder(self, path: bytes) -> bytes:
        found = self._folders.get(path)
        if found is None:
            if len(self._folders) >= _MOST_FOLDERS:
                return os.path.abspath(path)
            found = self._folders[path] = os.path.realpath(path)
        return found


def _resolve(folder: Path, stored: pa.Scalar, resolve: Callable[[bytes], bytes]) -> bytes:
    """A stored path, made absolute and resolved; a URL, and a path that no file can have, is unchanged."""
    text: bytes = stored.as_py()
    try:
        if is_url(text.decode()):
            return text
        return resolve(os.path.join(os.fsencode(folder), os.fsencode(decode_path(text.decode()))))
    except (VideoError, ValueError):
        return text


def _printable_key(key: pa.Scalar) -> str:
    path, _, offset = key.as_py().rpartition(b"\0")
    text = printable(Path(os.fsdecode(path)))
    if len(text) > _NAME_LENGTH:
        text = f"...{text[-_NAME_LENGTH:]}"
    return text if offset == b"0" else f"{text} at byte {offset.decode()}"
