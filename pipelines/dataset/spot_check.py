"""Opens a few videos of a manifest before a run, to detect a data set that was moved."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.bad_samples import BadSample
from pipelines.dataset.manifest import Manifest
from pipelines.dataset.probe import MISSING
from pipelines.dataset.source import open_source
from pipelines.errors import VideoError
from pipelines.formatting import printable
from pipelines.storage.remote_range import DIRECT, StorageOptions

OPENED = 8
"""Videos of a manifest that are opened, evenly over it."""

_NAMED = 3
"""Videos that a message names."""


@dataclass(frozen=True)
class SpotCheckResult:
    """The result of opening a few videos of a manifest."""

    name: str
    """The manifest in messages."""
    videos: int
    """Videos of the manifest."""
    opened: int
    """Videos that were opened."""
    bad_samples: tuple[BadSample, ...]
    """The opened videos that cannot be used."""
    lost: Path | None = None
    """If no file was found: the folder that should contain them all."""

    @property
    def message(self) -> str:
        """What is wrong, with the first reasons; empty where nothing is."""
        if not self.bad_samples:
            return ""
        tried = "tried " if self.opened < self.videos else ""
        bad = len(self.bad_samples)
        some = f"{self.opened} {tried}video{'s' * (self.opened > 1)} of {self.name}"
        if self.lost is not None:
            return format_none_found(some, self.lost)
        counted = f"none of {some} can be used" if bad == self.opened else f"{bad} of {some} cannot be used"
        return f"{counted}; {format_defects([(defect.path, defect.reason) for defect in self.bad_samples])}"


def spot_check(
    manifest: Manifest, name: str | None = None, most: int = OPENED, storage: StorageOptions = DIRECT
) -> SpotCheckResult:
    """Open at most `most` videos, evenly over the manifest, and read each one's header with the codec.

    Args:
        name: the manifest in messages; by default its path.
        storage: how videos in an object store are read.

    Raises StoreUnavailable where an object store is away.
    """
    opened = range(0, len(manifest), max(1, -(-len(manifest) // most)))
    bad_samples, missing = [], []
    for index in opened:
        try:
            row = manifest.row(index)
            open_source(manifest.absolute_path(row), row, storage=storage).check_opens()
        except VideoError as defect:
            bad_samples.append(BadSample(index, manifest.printable_path(index), str(defect)))
            if str(defect) == MISSING:
                missing.append(manifest.path_at(index))
    name = printable(manifest.path) if name is None else name
    lost = common_folder([path.parent for path in missing]) if len(missing) == len(opened) > 0 else None
    return SpotCheckResult(name, len(manifest), len(opened), tuple(bad_samples), lost)


def format_defects(bad: Sequence[tuple[str, str]]) -> str:
    """The end of a message: the first of several bad videos, each as path and reason."""
    different = list(dict.fromkeys(f"{path} {reason}" for path, reason in bad))  # rows may be of one file
    named = "; ".join(different[:_NAMED])
    return f"the first: {named}"


def common_folder(folders: Sequence[Path]) -> Path:
    """The folder that contains all of these; if it is missing, the topmost missing folder."""
    folder = Path(os.path.commonpath(folders))
    while not os.path.exists(folder.parent):
        folder = folder.parent
    return folder


def format_none_found(videos: str, folder: Path) -> str:
    """The message if none of the videos is found. folder: the one that should contain them all."""
    where = printable(folder) + ("" if os.path.exists(folder) else ", a folder that does not exist")
    return (
        f"none of {videos} was found under {where}: were they moved? Move them back, or make the manifest "
        "again with uniformerv2 prepare"
    )
