"""The probed properties of videos, written to files while they are probed.

An interrupted call goes on where it was, and several machines can share the work: what one of them has
written is not probed again. A result is found by what was probed, not by its place in a list, so that the
list may change meanwhile. A video whose size or time of change differs is probed again, as is one that could
not be used.

Each call appends to a file of its own, a line for each video: checksum, hash of what was probed, and the
result as JSON. A line that was cut or damaged is not used.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Generic, Self, TypeVar

import numpy as np

from pipelines.errors import DataError, VideoError
from pipelines.formatting import printable
from pipelines.worker_pool import Progress, ordered_map

Item = TypeVar("Item")
Value = TypeVar("Value")
Part = tuple[int, int]
"""(i, n): the i-th of n parts, from 0."""

WHOLE: Part = (0, 1)

_BLOCK = 64  # consecutive videos that one part probes: those of one file follow one another
_CHECKSUM = 8  # hexadecimal digits
_DIGEST = 16  # bytes
_HEAD = _CHECKSUM + 1 + 2 * _DIGEST + 1  # characters before the JSON
_PLACE_BITS = 44  # of a position in a file; the bits above are the file's number

_DAMAGED = (KeyError, TypeError, ValueError, RecursionError)
"""What reading a result raises that another version of the program wrote."""

Stamp = list[int] | None
"""Size and time of change of a video in nanoseconds, of a folder those of all its files; None where there is
none."""


class ProbeLog(Generic[Value]):
    """The results of one listing: those of earlier calls and those of this one.

    with ProbeLog(folder, encode, decode) as log:
        log.probe(...)
        for result in log.results(): ...
        log.remove()
    """

    def __init__(
        self,
        folder: Path,
        encode: Callable[[Value], dict[str, Any]],
        decode: Callable[[dict[str, Any]], Value],
    ) -> None:
        """
        Args:
            folder: of the files; made if there is none.
            encode: the result of a usable video as JSON.
            decode: its inverse. Raises KeyError, TypeError or ValueError for what another version encoded.
        """
        self.folder = folder
        self._encode = encode
        self._decode = decode
        self._files: list[BinaryIO] = []
        self._own: BinaryIO | None = None
        self._size = 0  # of the own file
        self._places = np.zeros(0, np.int64)  # of each item's line; -1 if there is none

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._files = [path.open("rb") for path in sorted(self.folder.glob("probe-*.log"))]
            name = f"probe-{time.time_ns():020d}-{os.getpid()}.log"
            self._own = (self.folder / name).open("xb", buffering=0)
            self._files.append((self.folder / name).open("rb"))
        except OSError as error:
            self.__exit__(None, None, None)
            raise self._not_written(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in [*self._files, *([self._own] if self._own else [])]:
            file.close()

    def probe(
        self,
        function: Callable[[Item], Value | VideoError],
        items: Callable[[], Iterable[Item]],
        paths: Sequence[str],
        *,
        part: Part,
        workers: int,
        progress: Progress | None,
        on_crash: VideoError,
    ) -> tuple[int, int]:
        """Call `function` for each item of `part` that has no result. Returns the numbers of all items of the
        part, and of those that had a result.

        Args:
            items: returns the items, whose `repr` has all that the result depends on, but for the path.
            paths: of the items; their files' size and time of change are recorded.
            workers, progress: as for `ordered_map`.
            on_crash: the result of an item that crashes its process.

        Raises:
            DataError: the results cannot be written.
        """
        digests = _digest_array(_digest(item, path) for item, path in zip(items(), paths, strict=True))
        self._places = self._find(digests, paths)
        mine = np.arange(len(paths)) // _BLOCK % part[1] == part[0]
        todo = np.flatnonzero(mine & (self._places < 0))
        with closing(
            ordered_map(
                partial(_stamped, function=function),
                _chosen(todo, paths, items()),
                total=len(todo),
                workers=workers,
                progress=progress,
                on_crash=lambda job: (_stamp(job[0]), on_crash),
            )
        ) as results:
            for index, (stamp, result) in zip(todo.tolist(), results, strict=True):
                self._places[index] = self._append(digests[index], stamp, result)
        return int(mine.sum()), int(mine.sum()) - len(todo)

    def results(self) -> Iterator[Value | VideoError]:
        """The result of each item, in order; all must have been probed.

        Raises:
            DataError: the files were changed meanwhile.
        """
        for place in self._places.tolist():
            try:
                values = self._read(place)
                yield VideoError(values["bad"]) if "bad" in values else self._decode(values)
            except _DAMAGED as error:
                raise DataError(
                    f"{printable(self.folder)} was changed by another program; run the same command again"
                ) from error

    def remove(self) -> None:
        """Delete all files of the program, and the folder if nothing else is in it."""
        for pattern in ("probe-*.log", "part-*.done", "plan.json", ".*.body", ".*.whole", ".*.partial"):
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)
        with suppress(OSError):  # it holds other files
            self.folder.rmdir()

    def _append(self, digest: np.bytes_, stamp: Stamp, result: Value | VideoError) -> int:
        """Write a line. Returns its place."""
        assert self._own is not None
        values = {"bad": str(result)} if isinstance(result, VideoError) else self._encode(result)
        line = _format_line(digest.ljust(_DIGEST, b"\0"), {"stamp": stamp, **values})
        try:
            if self._own.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise self._not_written(error) from error
        place = (len(self._files) - 1) << _PLACE_BITS | self._size
        self._size += len(line)
        return place

    def _read(self, place: int) -> dict[str, Any]:
        """The values of a line. Raises one of `_DAMAGED` if it is not what was written."""
        file = self._files[place >> _PLACE_BITS]
        file.seek(place & (1 << _PLACE_BITS) - 1)
        values = json.loads(file.readline()[_HEAD:])
        if not isinstance(values, dict):
            raise ValueError("no object")
        return values

    def _find(self, digests: np.ndarray, paths: Sequence[str]) -> np.ndarray:
        """The place of the newest line of each digest; -1 where there is none that can be used."""
        found = np.full(len(digests), -1, np.int64)
        lines = [list(_read_digests(file, number)) for number, file in enumerate(self._files)]
        known = _digest_array(digest for group in lines for digest, _ in group)
        if not len(known):
            return found
        places = np.array([place for group in lines for _, place in group])
        order = np.argsort(known, kind="stable")
        known, places = known[order], places[order]
        nearest = np.maximum(np.searchsorted(known, digests, side="right") - 1, 0)
        for index in np.flatnonzero(known[nearest] == digests).tolist():
            place = int(places[nearest[index]])
            try:
                values = self._read(place)
                stamp = values["stamp"]
                if "bad" not in values and stamp is not None and stamp == _stamp(paths[index]):
                    self._decode(values)
                    found[index] = place
            except _DAMAGED:
                continue  # of another version
        return found

    def _not_written(self, error: OSError) -> DataError:
        return DataError(
            f"{printable(self.folder)} cannot be written: {error.strerror}; run the same command again once "
            "it can be"
        )


def _chosen(indices: np.ndarray, paths: Sequence[str], items: Iterable[Item]) -> Iterator[tuple[str, Item]]:
    """Path and item at some ascending indices."""
    wanted = np.zeros(len(paths), bool)
    wanted[indices] = True
    return (job for job, is_wanted in zip(zip(paths, items, strict=True), wanted, strict=True) if is_wanted)


def _stamped(
    job: tuple[str, Item], function: Callable[[Item], Value | VideoError]
) -> tuple[Stamp, Value | VideoError]:
    path, item = job
    return _stamp(path), function(item)  # the stamp first: a video that changes meanwhile is probed again


def _stamp(path: str) -> Stamp:
    try:
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode):
            with os.scandir(path) as entries:
                files = [entry.stat() for entry in entries]
            newest = max((file.st_mtime_ns for file in files), default=0)
            return [len(files), sum(file.st_size for file in files), newest, found.st_mtime_ns]
    except (OSError, ValueError):
        return None
    return [found.st_size, found.st_mtime_ns]


def _digest(item: object, path: str) -> bytes:
    """What identifies a result: the item, and the absolute path of its video."""
    text = f"{os.path.abspath(path)}\0{item!r}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=_DIGEST).digest()


def _digest_array(digests: Iterable[bytes]) -> np.ndarray:
    """Digests as an array that can be sorted."""
    return np.frombuffer(b"".join(digests), f"S{_DIGEST}")


def _format_line(digest: bytes, values: dict[str, Any]) -> bytes:
    content = f"{digest.hex()} {json.dumps(values, separators=(',', ':'))}".encode()
    return b"%08x %s\n" % (zlib.crc32(content), content)


def _read_digests(file: BinaryIO, number: int) -> Iterator[tuple[bytes, int]]:
    """The digests of the undamaged lines of file `number`, each with its place."""
    position = 0
    for line in file:
        content = line[_CHECKSUM + 1 : -1]
        if line.endswith(b"\n") and line[: _CHECKSUM + 1] == b"%08x " % zlib.crc32(content):
            yield bytes.fromhex(content[: 2 * _DIGEST].decode()), number << _PLACE_BITS | position
        position += len(line)
