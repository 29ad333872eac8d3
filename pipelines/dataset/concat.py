"""The samples of a run: one manifest, or several concatenated."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Protocol, Self

from pipelines.dataset.manifest import Manifest, ManifestRow
from pipelines.decode.packet_index import PacketIndex
from pipelines.errors import DataError
from pipelines.formatting import printable


class Samples(Protocol):
    """Videos by index, as a sample reader needs them; see the methods of `Dataset`."""

    def __len__(self) -> int: ...

    def row(self, sample: int) -> ManifestRow: ...

    def path(self, sample: int) -> Path: ...

    def packets(self, sample: int) -> PacketIndex | None: ...

    def printable_path(self, sample: int) -> str: ...


class Dataset:
    """Concatenated manifests: the samples are the rows of the first, then those of the second, and so on.

    Holds only the manifests and the first sample of each, so its time and memory do not depend on the number
    of rows. Pickles as the manifests do: as paths and fingerprints.
    """

    def __init__(self, manifests: Sequence[Manifest]) -> None:
        """
        Raises:
            DataError: there is no manifest, or two of them have different class names.
        """
        if not manifests:
            raise DataError("a dataset needs at least one manifest; name one, such as data/train.arrow")
        self.manifests = tuple(manifests)
        for other in self.manifests[1:]:
            check_same_classes(self.manifests[0], other)
        # The first sample of each manifest; the number of all samples.
        *self.starts, self._samples = accumulate(map(len, self.manifests), initial=0)

    @classmethod
    def open(cls, paths: Sequence[str | Path]) -> Self:
        """Map the manifests at `paths`.

        Raises:
            DataError: as `Manifest.open`, and if two manifests have different class names.
        """
        return cls([Manifest.open(path) for path in paths])

    def __len__(self) -> int:
        return self._samples

    def __str__(self) -> str:
        """The manifests' paths, for messages."""
        return " + ".join(printable(manifest.path) for manifest in self.manifests)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.manifests[0].class_names

    @property
    def fingerprint(self) -> str:
        """That of the only manifest; of several, the SHA-256 of theirs in order, as hexadecimal digits."""
        if len(self.manifests) == 1:
            return self.manifests[0].fingerprint
        return hashlib.sha256("\n".join(m.fingerprint for m in self.manifests).encode()).hexdigest()

    def row(self, sample: int) -> ManifestRow:
        """The row of `sample`, 0 <= sample < len(self).

        Raises:
            IndexError: there is no such sample.
            VideoError: a value of the row is not possible for a video; see `check_row`.
            DataError: the manifest is damaged there.
        """
        manifest, index = self._place(sample)
        return manifest.row(index)

    def path(self, sample: int) -> Path:
        """The absolute path of the sample's file; checks and raises as `row` does, but for the path only."""
        manifest, index = self._place(sample)
        return manifest.path_at(index)

    def packets(self, sample: int) -> PacketIndex | None:
        """The packet index of the sample's video; checks and raises as `Manifest.packets_at` does."""
        manifest, index = self._place(sample)
        return manifest.packets_at(index)

    def printable_path(self, sample: int) -> str:
        """The sample's path for messages."""
        manifest, index = self._place(sample)
        return manifest.printable_path(index)

    def _place(self, sample: int) -> tuple[Manifest, int]:
        if not 0 <= sample < self._samples:
            raise IndexError(f"sample {sample} of {self}, which has {self._samples} samples")
        # The last manifest that begins at or before the sample; an empty one begins where the next one does.
        number = bisect_right(self.starts, sample) - 1
        return self.manifests[number], sample - self.starts[number]


def check_same_classes(one: Manifest, other: Manifest) -> None:
    """
    Raises:
        DataError: the class names differ or are in another order; the message names the first difference.
    """
    if one.class_names == other.class_names:
        return
    for label, names in enumerate(zip(one.class_names, other.class_names, strict=False)):
        if names[0] != names[1]:
            difference = f"label {label} is {names[0]!r} in the first and {names[1]!r} in the second"
            break
    else:
        difference = f"the first has {len(one.class_names)}, the second {len(other.class_names)}"
    raise DataError(
        f"{printable(one.path)} and {printable(other.path)} have different classes: {difference}. Make both "
        "manifests with the same class list: `uniformerv2 prepare ... --classes FILE`"
    )
