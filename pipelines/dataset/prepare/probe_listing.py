"""Probes the videos of a listing: in one call or in parts, and from where an interrupted call ended."""

import stat
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.dataset.content_key import content_key
from pipelines.dataset.prepare.duplicates import Progress
from pipelines.dataset.prepare.listing import Listing
from pipelines.dataset.prepare.probe_log import Part, ProbeLog
from pipelines.dataset.probe import CRASHES, VideoInfo, probe_video
from pipelines.errors import VideoError


@dataclass(frozen=True, slots=True)
class ToProbe:
    """What is probed for a row. Its `repr` tells it from everything else that is probed."""

    path: str
    deep: bool


Probed = tuple[VideoInfo, int]
"""The properties of a video, and its content key."""


def _probe(job: ToProbe) -> Probed | VideoError:
    """The properties of a video, or its defect."""
    path = Path(job.path)
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise VideoError("is a folder" if stat.S_ISDIR(mode) else "is not a regular file")
        info = probe_video(path, deep=job.deep)
    except VideoError as defect:
        return defect
    except OSError as error:
        return VideoError(f"cannot be read: {error.strerror}")
    return info, content_key(path)


def _as_json(probed: Probed) -> dict[str, Any]:
    info, key = probed
    return {"info": asdict(info), "key": key}


def _from_json(values: dict[str, Any]) -> Probed:
    info = VideoInfo(**values["info"])
    return replace(info, notes=tuple(info.notes)), values["key"]


def probe_part(
    out: Path,
    listing: Listing,
    part: Part,
    *,
    workers: int,
    deep: bool = False,
    progress: Progress | None = None,
) -> int:
    """Probe one part of the videos for `build_manifest`, which another call makes.

    Args:
        workers, deep, progress: as for `build_manifest`.

    Returns the number of the part's videos.
    """
    with open_probe_log(out) as log:
        return probe_listing(log, listing, part, workers=workers, deep=deep, progress=progress)[0]


def parts_folder(out: Path) -> Path:
    """The folder of what was probed for the manifest `out` before it is written."""
    return out.with_name(f"{out.name}.parts")


def open_probe_log(out: Path) -> ProbeLog[Probed]:
    """The record of what was probed for the manifest `out`."""
    return ProbeLog(parts_folder(out.absolute()), _as_json, _from_json)


def probe_listing(
    log: ProbeLog[Probed],
    listing: Listing,
    part: Part,
    *,
    workers: int,
    deep: bool,
    progress: Progress | None,
) -> tuple[int, int]:
    """Probe the videos of a part that have no result. Returns the numbers of its videos, and of those that
    had one."""
    return log.probe(
        _probe,
        lambda: (ToProbe(path, deep) for path in listing.paths),
        listing.paths,
        part=part,
        workers=workers,
        progress=progress,
        on_crash=VideoError(CRASHES),
    )
