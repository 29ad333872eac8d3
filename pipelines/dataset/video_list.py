"""Video files and folders of frames without a manifest, probed when they are read."""

from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Self

from pipelines.dataset.manifest import ManifestRow, SourceKind, encode_path
from pipelines.dataset.probe import CRASHES, probe_frames, probe_video
from pipelines.errors import VideoError
from pipelines.formatting import printable
from pipelines.worker_pool import IsolatedProcess


class VideoFiles:
    """Files as samples, in the given order, all with label 0. Holds only their paths.

    Each `row` probes its file as `prepare` does, in 2 to 20 ms, so that the number of frames is that of a
    manifest. A worker process probes in its own process; within `with`, a separate process does, so that a
    file that crashes it does not end the program.

    with VideoFiles(paths) as files:
        loader = view_loader(files, ...)
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._isolation: IsolatedProcess | None = None

    def __reduce__(self) -> tuple[type[Self], tuple[Sequence[Path]]]:
        return type(self), (self._paths,)

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
        """The row of a manifest that the file would have. Raises VideoError if the file cannot be used."""
        if self._isolation is None:
            return probe_row(self._paths[sample])
        try:
            return self._isolation.call(probe_row, self._paths[sample])
        except BrokenProcessPool:
            raise VideoError(CRASHES) from None

    def path(self, sample: int) -> Path:
        return self._paths[sample].absolute()

    def packets(self, sample: int) -> None:
        """Files on a command line have no packet index."""

    def printable_path(self, sample: int) -> str:
        return printable(self._paths[sample])


def probe_row(path: Path) -> ManifestRow:
    """The row of a manifest that the file, or the folder of JPEG frames, would have.

    Raises VideoError if it cannot be used.
    """
    folder = path.is_dir()
    info = probe_frames(path) if folder else probe_video(path)
    return ManifestRow(
        encode_path(path), 0, 0, 0, info.frames, info.fps, info.width, info.height, info.codec,
        source=SourceKind.FRAMES if folder else SourceKind.FILE,
    )  # fmt: skip
