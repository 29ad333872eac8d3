"""From a listing to a manifest, and from a manifest back to its videos: what is bad is set apart by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from pipelines import DataError, VideoDefect
from pipelines.datasets.listing import Listing
from pipelines.manifest import Manifest, Row, write_manifest
from pipelines.parallel import ordered_map
from pipelines.probe import CRASHES, VideoInfo, probe_many, probe_video

Progress = Callable[[int, int], None]


_NAMED = 8
"""Classes and bad videos that a summary names."""


@dataclass(frozen=True, slots=True)
class Report:
    """A manifest and the videos that cannot be used."""

    manifest: Manifest
    bad: int
    """How many videos cannot be used."""
    bad_list: Path
    """`<manifest>.bad.txt`, or `.check.txt` of a check: on each line a file and, after a tab, its defect. No
    bad video, no list."""

    fate: str
    """What became of the bad videos, in words that follow `are`."""

    def summary(self) -> str:
        """What there is, in a line, and the first of the bad videos, if there are any."""
        names = self.manifest.class_names
        shown = ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
        text = f"{self.manifest.path}: {len(self.manifest)} videos of {len(names)} classes ({shown})"
        if not self.bad:
            return text
        first = self.bad_list.read_text(encoding="utf-8").splitlines()[:_NAMED]
        more = f"\n  and {self.bad - _NAMED} more" if self.bad > _NAMED else ""
        listed = "".join("\n  " + line.replace("\t", " ") for line in first)
        videos = "bad video is" if self.bad == 1 else "bad videos are"
        return f"{text}; {self.bad} {videos} {self.fate}, see {self.bad_list}:{listed}{more}"


def build_manifest(
    out: Path, listing: Listing, *, workers: int, deep: bool = False, progress: Progress | None = None
) -> Report:
    """Probe every video of `listing` and write those that can be used to the manifest `out`.

    Files under the manifest's folder are written relative to it, so that the folder can be moved; others
    absolutely. The manifest appears when it is complete; it has weights where the listing has some.

    Args:
        workers: processes to probe in; with more than one, the caller's main module must be importable.
        deep: decode every frame of every video, which finds damage inside, too.
        progress: called after each video with the number of videos probed and of all.

    Raises:
        DataError: no video can be used, or only such of weight 0.
    """
    weights = [1.0] * len(listing.videos) if listing.weights is None else listing.weights
    bad: list[str] = []
    folder = out.absolute().parent

    def good_rows() -> Iterator[Row]:
        paths = [path for path, _ in listing.videos]
        with closing(probe_many(paths, workers=workers, deep=deep, progress=progress)) as results:
            for (path, label), weight, result in zip(listing.videos, weights, results, strict=True):
                if isinstance(result, VideoDefect):
                    bad.append(f"{path}\t{result}")
                else:
                    yield _row(stored_path(path, folder), label, result, weight)
        if len(bad) == len(listing.videos):
            bad_list = _write_bad_list(out, bad)
            raise DataError(f"none of {len(bad)} videos can be used; {bad_list} says why")

    manifest = write_manifest(out, good_rows(), listing.class_names, weighted=listing.weights is not None)
    return Report(manifest, len(bad), _write_bad_list(manifest.path, bad), "left out")


def check_manifest(
    path: Path, *, workers: int, deep: bool = False, progress: Progress | None = None
) -> Report:
    """Compare a manifest with its own fingerprint, and its rows with the videos as they are now.

    Args:
        workers, deep, progress: as for `build_manifest`.

    Raises:
        DataError: the manifest cannot be opened, or its content is not what was written.
    """
    manifest = Manifest.open(path)
    manifest.verify()
    jobs = ((manifest.absolute_path(row), row, deep) for row in map(manifest.row, range(len(manifest))))
    bad = []
    with closing(
        ordered_map(
            _defect, jobs, total=len(manifest), workers=workers, progress=progress, on_crash=lambda _: CRASHES
        )
    ) as defects:
        for index, defect in enumerate(defects):
            if defect:
                bad.append(f"{manifest.absolute_path(manifest.row(index))}\t{defect}")
    return Report(manifest, len(bad), _write_bad_list(manifest.path, bad, "check"), "still in the manifest")


def _row(path: str, label: int, info: VideoInfo, weight: float) -> Row:
    return Row(
        path=path,
        offset=0,
        length=0,
        label=label,
        frames=info.frames,
        fps=info.fps,
        width=info.width,
        height=info.height,
        codec=info.codec,
        weight=weight,
    )


def stored_path(path: Path, folder: Path) -> str:
    """How a manifest in `folder` names the file: relative where it lies below, otherwise absolute."""
    path = path.absolute()
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _defect(job: tuple[Path, Row, bool]) -> str:
    """What is wrong with a row's video, in words that follow its name; empty if nothing is."""
    path, row, deep = job
    try:
        info = probe_video(_piece(path, row) if row.length else path, deep=deep)
    except VideoDefect as defect:
        return str(defect)
    now, then = _likeness(info), _likeness(row)
    return "" if now == then else f"has {now}, the manifest says {then}: it was changed since"


def _likeness(video: VideoInfo | Row) -> str:
    return f"{video.frames} frames of {video.width}x{video.height} in {video.codec}"


def _piece(path: Path, row: Row) -> bytes:
    try:
        with path.open("rb") as shard:
            shard.seek(row.offset)
            return shard.read(row.length)
    except OSError as error:
        raise VideoDefect(f"cannot be read: {error.strerror}") from error


def _write_bad_list(manifest: Path, bad: list[str], kind: str = "bad") -> Path:
    path = manifest.with_name(f"{manifest.name}.{kind}.txt")
    if bad:
        path.write_text("".join(f"{line}\n" for line in bad), encoding="utf-8")
    else:
        path.unlink(missing_ok=True)
    return path
