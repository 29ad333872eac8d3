"""Video files without a manifest, each of which is probed when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Self

from pipelines.dataset.manifest import ManifestRow, encode_path
from pipelines.dataset.probe import CRASHES, probe_video
from pipelines.errors import VideoError
from pipelines.formatting import printable
from pipelines.worker_pool import IsolatedProcess


class VideoFiles:
    """Files as samples, in their order, all with label 0. Holds their paths and nothing else.

    A file is probed as `prepare.py` does it, so that its frames are those that a manifest would count. That
    costs 2 to 20 ms for each `row`: in a worker process there, elsewhere in a process of its own, which a
    file may crash.

    with VideoFiles(paths) as files:
        loader = view_loader(files, ...)
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._isolation: IsolatedProcess | None = None

    def __reduce__(self) -> tuple[type[VideoFiles], tuple[Sequence[Path]]]:
        return VideoFiles, (self._paths,)

    def __enter__(self) -> Self:
        self._isolation = IsolatedProcess().__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._isolation is not None:
            self._isolation.__exit__()

    def __len__(self) -> int:
        return len(self._paths)

    def __str__(self) -> str:
        return f"{len(self)} video files"

    def row(self, sample: int) -> ManifestRow:
        """What the file is like. Raises VideoError where it cannot be used."""
        if self._isolation is None:
            return probe_row(self._paths[sample])
        try:
            return self._isolation.call(probe_row, self._paths[sample])
        except BrokenProcessPool:
            raise VideoError(CRASHES) from None

    def path(self, sample: int) -> Path:
        return self._paths[sample].absolute()

    def printable_path(self, sample: int) -> str:
        return printable(self._paths[sample])


def probe_row(path: Path) -> ManifestRow:
    """The row of a manifest that the file would have. Raises VideoError where it cannot be used."""
    info = probe_video(path)
    return ManifestRow(encode_path(path), 0, 0, 0, info.frames, info.fps, info.width, info.height, info.codec)
