"""Probes the videos of a listing: in one call or in parts, and from where an interrupted call ended."""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from pipelines.dataset.prepare.listing import Listing
from pipelines.dataset.prepare.probe_log import Part, ProbeLog
from pipelines.dataset.prepare.probe_row import ListedRow, ProbedRow, probe_listed
from pipelines.dataset.probe import CRASHES, VideoInfo
from pipelines.errors import VideoError
from pipelines.worker_pool import Progress


@dataclass(frozen=True, slots=True)
class ToProbe:
    """What is probed for a row. Its `repr` tells it from everything else that is probed."""

    row: ListedRow
    deep: bool


def _probe(job: ToProbe) -> ProbedRow | VideoError:
    return probe_listed(job.row, deep=job.deep)


def _from_json(values: dict[str, Any]) -> ProbedRow:
    info = VideoInfo(**values["info"])
    names = [each.name for each in fields(ProbedRow)]
    rest = {name: values[name] for name in names if name != "info"}
    return ProbedRow(replace(info, notes=tuple(info.notes)), **rest)


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


def open_probe_log(out: Path) -> ProbeLog[ProbedRow]:
    """The record of what was probed for the manifest `out`."""
    return ProbeLog(parts_folder(out.absolute()), asdict, _from_json)


def probe_listing(
    log: ProbeLog[ProbedRow],
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
        lambda: (ToProbe(row, deep) for row in listing.rows()),
        listing.paths,
        part=part,
        workers=workers,
        progress=progress,
        on_crash=VideoError(CRASHES),
    )
