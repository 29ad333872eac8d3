"""Files that get their name once they are complete."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STALE = 3600.0
"""Seconds since its last change after which a partial file is that of a killed process."""


@contextmanager
def atomic_file(path: Path, *, sync: bool = False, shared: bool = False) -> Iterator[Path]:
    """Yield a path beside `path` to write to; the file replaces `path` if the block ends without an error.

    After an error, an interrupt included, the partial file is removed and `path` is unchanged.

    Args:
        path: the file to write.
        sync: wait until content and name have reached the disk, so that a power cut leaves no half file.
        shared: other processes may write the same file meanwhile.

    Raises OSError where the file cannot be written or renamed.
    """
    partial = partial_path(path, shared=shared)
    try:
        yield partial
        rename_partial(partial, path, sync=sync)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def partial_path(path: Path, *, shared: bool = False) -> Path:
    """The name of a file while it is incomplete; `shared` adds the process number."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial" if shared else f".{path.name}.partial")


def rename_partial(partial: Path, path: Path, *, sync: bool) -> None:
    """Give a complete file its name; see `atomic_file`. Raises OSError."""
    if sync:
        flush(partial)
    partial.replace(path)
    if sync:
        flush(path.parent)


def flush(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
