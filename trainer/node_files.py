"""Manifests on a node: one rank reads them before the others, and may copy them to the node's own disk."""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pipelines import DataError, VideoDefect
from pipelines.manifest import Manifest
from pipelines.paths import printable
from trainer import RunError
from trainer.environment import Environment

_SECONDS_PER_NODE = 0.02
_SECONDS_AT_MOST = 10.0


def read_first(paths: Sequence[Path], environment: Environment, node_copy: Path | None) -> None:
    """Open, and copy where that is asked for, the manifests before the other ranks of the node do.

    Does something on each node's first rank only: the others find in the node's memory what it looked up and
    read. To be done on all ranks `together`.

    Raises DataError for what is no manifest, RunError where it cannot be copied.
    """
    if environment.local_rank > 0:
        return
    # A thousand nodes that open the same file at one instant stand in line at the one server of a shared
    # file system that knows its names, and everybody else's jobs with them: they come one after another.
    time.sleep(min(_SECONDS_AT_MOST, _SECONDS_PER_NODE * environment.node_rank))
    for path in paths:
        manifest = open_manifest(path)
        if node_copy is not None:
            _copy(manifest, node_copy, environment.node)


def open_manifest(path: Path, node_copy: Path | None = None) -> Manifest:
    """Open a manifest, or the copy that `read_first` made of it; its videos are where they are anyway.

    Raises DataError for a file that is none, is damaged at an end, or lists no video.
    """
    if node_copy is None:
        manifest = Manifest.open(path)
    else:
        manifest = Manifest.open(_copy_of(path, node_copy), path.absolute().parent)
    if len(manifest) == 0:
        raise DataError(f"{printable(path)} lists no video")
    for end in (0, len(manifest) - 1):
        with suppress(VideoDefect):  # a bad row is a bad video, which a run can do without
            manifest.row(end)  # a damaged file shows here, and not first in a worker process
    return manifest


def _copy_of(path: Path, folder: Path) -> Path:
    """Where a manifest's copy is; the same name in two folders has two."""
    place = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:12]
    return folder.absolute() / f"{path.stem}-{place}{path.suffix}"


def _copy(manifest: Manifest, folder: Path, node: str) -> None:
    copy = _copy_of(manifest.path, folder)
    if _is_copy(copy, manifest):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Two runs on one node copy once.
        with open(copy.with_name(f".{copy.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_copy(copy, manifest):
                _write(manifest.path, copy, node)
    except OSError as error:
        raise RunError(
            f"data.node_copy: {printable(manifest.path)} cannot be copied into {folder} on {node} "
            f"({error.strerror}): name another folder, or set it to null"
        ) from error


def _write(original: Path, copy: Path, node: str) -> None:
    """Have the copy appear as a whole."""
    partial = copy.with_name(f".{copy.name}.partial")
    partial.unlink(missing_ok=True)  # of a run that was killed meanwhile
    free, size = shutil.disk_usage(copy.parent).free, original.stat().st_size
    if free < size:
        raise RunError(
            f"data.node_copy: {copy.parent} on {node} has {free / 2**20:.0f} MiB free, and the copy of "
            f"{original} takes {size / 2**20:.0f}: make room, name another folder, or set it to null"
        )
    try:
        with open(original, "rb") as source, open(partial, "wb") as target:
            shutil.copyfileobj(source, target, 2**22)
            target.flush()
            os.fsync(target.fileno())
        os.replace(partial, copy)
    finally:
        partial.unlink(missing_ok=True)


def _is_copy(copy: Path, manifest: Manifest) -> bool:
    """Whether this manifest, in its present state, is there; one that was cut short does not open."""
    try:
        return Manifest.open(copy).fingerprint == manifest.fingerprint
    except DataError:
        return False
