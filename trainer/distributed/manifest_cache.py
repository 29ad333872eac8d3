"""Manifests on a node: one rank reads them before the others, and may copy them to the node's own disk.

Others may be able to write to that disk, too. So copies lie in a folder that only this user may enter,
nothing there is reached through a link, and a copy is read to its end before it is used.
"""

import fcntl
import hashlib
import os
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pipelines.dataset.manifest import Manifest
from pipelines.errors import DataError, VideoError
from pipelines.formatting import printable
from trainer.distributed.environment import Environment
from trainer.errors import RunError

_SECONDS_PER_NODE = 0.02
_SECONDS_AT_MOST = 10.0


def prefetch_manifests(paths: Sequence[Path], environment: Environment, node_copy: Path | None) -> None:
    """Open, and copy where that is asked for, the manifests before the other ranks of the node do.

    Does something on each node's first rank only: the others find in the node's memory what it looked up and
    read. To be done on all ranks `run_on_all_ranks`.

    Raises DataError for what is no manifest, or is found damaged, RunError where it cannot be copied.
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
    """Open a manifest, or the copy that `prefetch_manifests` made of it; its videos stay where they are.

    Raises DataError for a file that is none, is damaged at an end, or lists no video; RunError for a copy
    that is not there any more, or is not this user's.
    """
    manifest = Manifest.open(path) if node_copy is None else _open_copy(_copy_of(path, node_copy), path)
    if len(manifest) == 0:
        raise DataError(f"{printable(path)} lists no video")
    for end in (0, len(manifest) - 1):
        with suppress(VideoError):  # a bad row is a bad video, which a run can do without
            manifest.row(end)  # a damaged file shows here, and not first in a worker process
    return manifest


def _open_copy(copy: Path, original: Path) -> Manifest:
    try:
        with _own_folder(copy.parent) as folder:
            if not _is_own_file(copy.name, folder):
                raise RunError(
                    f"data.node_copy: {printable(copy)} is not the file that this run put there: delete it, "
                    "and start again"
                )
            return Manifest.open(copy, original.absolute().parent)
    except OSError as error:
        raise RunError(
            f"data.node_copy: {printable(copy)} cannot be read ({error.strerror}): start again"
        ) from error


def _copy_of(path: Path, node_copy: Path) -> Path:
    """Where a manifest's copy is; the same name in two folders has two."""
    place = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:12]
    return node_copy.absolute() / f"manifests-{os.geteuid()}" / f"{path.stem}-{place}{path.suffix}"


@contextmanager
def _own_folder(path: Path) -> Iterator[int]:
    """The descriptor of a folder that belongs to this user, and that no other may enter from now on.

    Raises RunError for one that is another user's or is reached by a link, OSError where there is none.
    """
    if path.is_symlink():
        raise RunError(f"data.node_copy: {printable(path)} is a link, and may lead anywhere: delete it")
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        owner = os.fstat(folder).st_uid
        if owner != os.geteuid():
            raise RunError(
                f"data.node_copy: {printable(path)} belongs to user {owner}, not to user {os.geteuid()}, who "
                "runs this: name another folder, or set it to null"
            )
        os.fchmod(folder, stat.S_IRWXU)
        yield folder
    finally:
        os.close(folder)


def _is_own_file(name: str, folder: int) -> bool:
    """Whether a regular file of this user is there, and no link."""
    try:
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()


def _copy(manifest: Manifest, node_copy: Path, node: str) -> None:
    """Raises DataError for an original that is damaged, RunError where it cannot be copied."""
    copy = _copy_of(manifest.path, node_copy)
    try:
        node_copy.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            copy.parent.mkdir(stat.S_IRWXU)
        with _own_folder(copy.parent) as folder, _lock(f".{copy.name}.lock", folder):
            # Two runs on one node copy once.
            if not _is_copy(copy, manifest, folder):
                _write(manifest.path, copy, folder, node)
                if not _is_copy(copy, manifest, folder):
                    Manifest.open(manifest.path).verify_fingerprint()  # damaged, it has no whole copy
                    raise RunError(
                        f"data.node_copy: {printable(manifest.path)} was changed while {node} copied it: "
                        "start again"
                    )
    except OSError as error:
        raise RunError(
            f"data.node_copy: {printable(manifest.path)} cannot be copied into {node_copy} on {node} "
            f"({error.strerror}): name another folder, or set it to null"
        ) from error


@contextmanager
def _lock(name: str, folder: int) -> Iterator[None]:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    lock = os.open(name, flags, stat.S_IRUSR | stat.S_IWUSR, dir_fd=folder)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _write(original: Path, copy: Path, folder: int, node: str) -> None:
    """Have the copy appear as a whole."""
    partial = f".{copy.name}.partial"
    with suppress(FileNotFoundError):
        os.unlink(partial, dir_fd=folder)  # of a run that was killed meanwhile
    free, size = shutil.disk_usage(copy.parent).free, original.stat().st_size
    if free < size:
        raise RunError(
            f"data.node_copy: {copy.parent} on {node} has {free / 2**20:.0f} MiB free, and the copy of "
            f"{original} takes {size / 2**20:.0f}: make room, name another folder, or set it to null"
        )
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(partial, flags, stat.S_IRUSR | stat.S_IWUSR, dir_fd=folder)
    try:
        with open(descriptor, "wb") as target, open(original, "rb") as source:
            shutil.copyfileobj(source, target, 2**22)
            target.flush()
            os.fsync(target.fileno())
        os.replace(partial, copy.name, src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(partial, dir_fd=folder)


def _is_copy(copy: Path, manifest: Manifest, folder: int) -> bool:
    """Whether this manifest, in its present state, is there, whole and unchanged; reads all of the copy."""
    if not _is_own_file(copy.name, folder):
        return False
    try:
        return Manifest.open(copy).is_copy_of(manifest)
    except DataError:
        return False
