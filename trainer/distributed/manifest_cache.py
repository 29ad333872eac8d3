"""Node-local copies of manifests: one rank per node reads them first and may copy them to the node's disk.

Other users may be able to write to that disk. So the copies are in a folder with access for this user only,
symbolic links there are refused, and a copy is compared with its original before it is used.
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
from pipelines.dataset.packet_table import packets_path
from pipelines.errors import DataError, VideoError
from pipelines.formatting import printable
from trainer.distributed.environment import Environment
from trainer.errors import RunError
from trainer.system.formatting import format_bytes

_SECONDS_PER_NODE = 0.02
_MAX_SECONDS = 10.0


def prefetch_manifests(paths: Sequence[Path], environment: Environment, node_copy: Path | None) -> None:
    """Open the manifests on the first rank of each node, and copy them to `node_copy` if that is given.

    The node's other ranks read them afterwards, from the node's page cache. Call inside `run_on_all_ranks`.

    Raises DataError for a file that is no manifest or is damaged, RunError where it cannot be copied.
    """
    if environment.local_rank > 0:
        return
    # A thousand nodes that open one file at once overload the metadata server of a shared file system, for
    # other jobs too: each node starts a little later than the one before.
    time.sleep(min(_MAX_SECONDS, _SECONDS_PER_NODE * environment.node_rank))
    for path in paths:
        manifest = open_manifest(path)
        if node_copy is not None:
            _copy(manifest, node_copy, environment.node)


def open_manifest(path: Path, node_copy: Path | None = None) -> Manifest:
    """Open a manifest, or the copy that `prefetch_manifests` made of it.

    Raises DataError for a file that is no manifest, is damaged at an end, or lists no video; RunError for a
    copy that is missing or belongs to another user.
    """
    manifest = Manifest.open(path) if node_copy is None else _open_copy(_copy_of(path, node_copy), path)
    if len(manifest) == 0:
        raise DataError(f"{printable(path)} lists no video")
    for end in (0, len(manifest) - 1):
        with suppress(VideoError):  # a bad row is a bad sample, which a run skips
            manifest.row(end)  # raises for a damaged file here, not first in a worker
    return manifest


def _open_copy(copy: Path, original: Path) -> Manifest:
    try:
        with _own_folder(copy.parent) as folder:
            if not _is_own_file(copy.name, folder):
                raise RunError(
                    f"data.node_copy: {printable(copy)} is not this run's copy: delete it, and start again"
                )
            return Manifest.open(copy, original.absolute().parent, packets=packets_path(original))
    except OSError as error:
        raise RunError(
            f"data.node_copy: {printable(copy)} cannot be read ({error.strerror}): start again"
        ) from error


def _copy_of(path: Path, node_copy: Path) -> Path:
    """The path of a manifest's copy; it depends on the manifest's folder as well."""
    place = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:12]
    return node_copy.absolute() / f"manifests-{os.geteuid()}" / f"{path.stem}-{place}{path.suffix}"


@contextmanager
def _own_folder(path: Path) -> Iterator[int]:
    """Yield the descriptor of a folder of this user, after removing other users' access.

    Raises RunError for a folder of another user or a symbolic link, OSError where there is no folder.
    """
    if path.is_symlink():
        raise RunError(f"data.node_copy: {printable(path)} is a symbolic link: delete it")
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        owner = os.fstat(folder).st_uid
        if owner != os.geteuid():
            raise RunError(
                f"data.node_copy: {printable(path)} belongs to user {owner}, and this is user "
                f"{os.geteuid()}: name another folder, or set it to null"
            )
        os.fchmod(folder, stat.S_IRWXU)
        yield folder
    finally:
        os.close(folder)


def _is_own_file(name: str, folder: int) -> bool:
    """Whether `name` is a regular file of this user."""
    try:
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()


def _copy(manifest: Manifest, node_copy: Path, node: str) -> None:
    """Copy a manifest. Raises DataError if the original is damaged, RunError if it cannot be copied."""
    copy = _copy_of(manifest.path, node_copy)
    try:
        node_copy.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            copy.parent.mkdir(stat.S_IRWXU)
        with _own_folder(copy.parent) as folder, _lock(f".{copy.name}.lock", folder):
            # Two runs on one node make one copy.
            if not _is_copy(copy, manifest, folder):
                _write(manifest.path, copy, folder, node)
                if not _is_copy(copy, manifest, folder):
                    Manifest.open(manifest.path).verify_fingerprint()  # raises DataError if it is damaged
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
    """Write the copy atomically, without following links. Raises OSError, RunError for lack of space."""
    partial = f".{copy.name}.partial"
    with suppress(FileNotFoundError):
        os.unlink(partial, dir_fd=folder)  # of a run that was killed
    free, size = shutil.disk_usage(copy.parent).free, original.stat().st_size
    if free < size:
        raise RunError(
            f"data.node_copy: {copy.parent} on {node} has {format_bytes(free)} free, and the copy of "
            f"{original} takes {format_bytes(size)}: free space, name another folder, or set it to null"
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
    """Whether the copy equals the manifest; reads all of the copy."""
    if not _is_own_file(copy.name, folder):
        return False
    try:
        return Manifest.open(copy).is_copy_of(manifest)
    except DataError:
        return False
