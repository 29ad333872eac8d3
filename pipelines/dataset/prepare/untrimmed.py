"""Segments of untrimmed videos: the local file of each, and the listing of segments or of whole videos."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from pipelines.dataset.prepare.annotations import MISSING, YOUTUBE_ID, merge_rows
from pipelines.dataset.prepare.class_names import unknown_class
from pipelines.dataset.prepare.findings import Findings
from pipelines.dataset.prepare.listing import Listing
from pipelines.dataset.prepare.video_index import REPEATED as REPEATED_FILE
from pipelines.dataset.prepare.video_index import VideoFileIndex
from pipelines.errors import DataError
from pipelines.formatting import printable

Unit = Literal["segments", "videos"]

AMBIGUOUS = "clips whose files have times in their names that fit several, left out"
EMPTY = "segments that are empty or end before they begin, left out"

_PREFIXED = re.compile(r"v_([A-Za-z0-9_-]{11})")
_TRIMMED = re.compile(r"(?:v_)?([A-Za-z0-9_-]{11})_(\d+(?:\.\d+)?)_(\d+(?:\.\d+)?)")
_SAME_TIME = 1.0  # seconds: names have whole ones, rounded in any way


class Segment(NamedTuple):
    """Seconds `start` to `end` of a YouTube video."""

    youtube_id: str
    start: float
    end: float

    def __str__(self) -> str:
        return f"{self.youtube_id} {self.start:g}-{self.end:g} s"


Row = tuple[Segment, str, str]
"""A segment, its class, and the place of its row in the annotations."""


@dataclass(frozen=True, slots=True)
class Untrimmed:
    """The segments of one subset."""

    annotations: Path
    rows: Sequence[Row]
    class_names: tuple[str, ...]
    """Of all subsets, in alphabetical order: the index is the label."""
    durations: Mapping[str, float] = field(default_factory=dict)
    """Length of each whole video in seconds, by its id."""


def youtube_id(text: str, place: str) -> str:
    """The id in `ID` or `v_ID`. Raises DataError, which names the place, for anything else."""
    match = _PREFIXED.fullmatch(text)
    name = match[1] if match else text
    if not YOUTUBE_ID.fullmatch(name):
        raise DataError(f"{place}: '{printable(text)}' is no YouTube id of 11 characters")
    return name


def parse_seconds(text: object, place: str) -> float:
    """A number of seconds. Raises DataError, which names the place, for anything else."""
    try:
        seconds = float(str(text))
        if not -(10**6) < seconds < 10**6:
            raise ValueError
    except ValueError:
        raise DataError(f"{place}: '{printable(str(text))}' is no number of seconds") from None
    return seconds


def list_untrimmed(
    data: Untrimmed,
    videos: Sequence[Path],
    findings: Findings,
    *,
    unit: Unit,
    class_names: Sequence[str] | None = None,
) -> Listing:
    """The segments, or the whole videos, that have a local file.

    Segments come from a whole video, `v_ID.mp4` or `ID.mp4`, or else from a file of the segment alone,
    `ID_5_12.mp4` or `v_ID_000005_000012.mp4`, whose times differ by less than a second. A whole video has the
    class of its segments; one with segments of two classes is left out and listed.

    Args:
        videos: folders to search at any depth.
        class_names: in the order of the labels; by default those of the annotations.

    Raises:
        DataError: a class is not among `class_names`, or no clip has a file.
    """
    names = data.class_names if class_names is None else tuple(class_names)
    for name in data.class_names:
        if name not in names:
            raise DataError(f"{printable(data.annotations)}: {unknown_class(name, names)}")
    rows = []
    for segment, label, place in data.rows:
        if segment.start < segment.end:
            rows.append((segment, label, place))
        else:
            findings.add(EMPTY, str(segment), f"{EMPTY} ({place})")
    index = VideoFileIndex(videos, findings)
    found: list[_Found]
    if unit == "segments":
        segments = merge_rows(rows, findings)
        total, first = len(segments), next((segment.youtube_id for segment in segments), "ID")
        found = list(_segment_files(segments, index, findings))
    else:
        # Several segments of one class in a video are no repetition.
        of_videos: dict[tuple[str, str], str] = {}
        for segment, label, place in rows:
            of_videos.setdefault((segment.youtube_id, label), place)
        labels = merge_rows(((video, label, place) for (video, label), place in of_videos.items()), findings)
        total, first = len(labels), next(iter(labels), "ID")
        found = list(_video_files(labels, index, findings))
    index.report_unused()
    if not found:
        raise DataError(
            f"{printable(data.annotations)}: none of its {total} {unit} has a file among the {len(index)} "
            f"videos of {', '.join(map(printable, videos))}; the first would be called v_{first}.mp4 or "
            f"{first}.mp4"
        )
    findings.note(f"{len(found):,} of {total:,} {unit} of the annotations have a file.")
    numbers = {name: label for label, name in enumerate(names)}
    ordered = sorted((numbers[each.label], str(each.path), each.seconds or (), each) for each in found)
    lengths = [0.0 if each.trimmed else data.durations.get(each.youtube_id, 0.0) for *_, each in ordered]
    return Listing(
        [path for _, path, _, _ in ordered],
        array("l", [label for label, _, _, _ in ordered]),
        names,
        segments=[each.seconds for *_, each in ordered] if unit == "segments" else None,
        durations=lengths,
        findings=findings,
    )


class _Found(NamedTuple):
    """A clip and its file."""

    youtube_id: str
    label: str
    path: Path
    seconds: tuple[float, float] | None = None
    """Of the file; None for all of it."""
    trimmed: bool = False
    """Whether the file is not the whole video."""


def _video_files(labels: Mapping[str, str], index: VideoFileIndex, findings: Findings) -> Iterator[_Found]:
    for video, label in labels.items():
        if (path := _whole_video(video, index, findings)) is None:
            findings.add(MISSING, video)
        else:
            yield _Found(video, label, path)


def _segment_files(
    labels: Mapping[Segment, str], index: VideoFileIndex, findings: Findings
) -> Iterator[_Found]:
    segments: dict[str, list[Segment]] = {}
    for segment in labels:
        segments.setdefault(segment.youtube_id, []).append(segment)
    trimmed = _trimmed_files(index.stems())
    for segment, label in labels.items():
        video = segment.youtube_id
        if (path := _whole_video(video, index, findings)) is not None:
            yield _Found(video, label, path, (segment.start, segment.end))
            continue
        files = [file for file in trimmed.get(video, ()) if _same_times(file[0], segment)]
        if not files:
            findings.add(MISSING, str(segment))
            continue
        others = [other for other in segments[video] if _same_times(files[0][0], other)]
        path = index.find((files[0][1],))
        if len(files) > 1 or len(others) > 1 or path is None:
            names = ", ".join(printable(stem) for _, stem in files)
            findings.add(AMBIGUOUS, str(segment), f"{AMBIGUOUS}: {names}")
        else:
            yield _Found(video, label, path, trimmed=True)


def _whole_video(video: str, index: VideoFileIndex, findings: Findings) -> Path | None:
    """The file of a whole video. A second one under the other name is listed once."""
    path = index.find((f"v_{video}", video))
    if path is not None and path.stem != video and not index.is_used(video):
        other = index.find((video,))
        if other is not None:
            findings.add(REPEATED_FILE, other, f"the same video as {printable(path)}")
    return path


def _trimmed_files(stems: Iterable[str]) -> dict[str, list[tuple[tuple[float, float], str]]]:
    """Times and stem of the files whose names have times, by the video's id."""
    found: dict[str, list[tuple[tuple[float, float], str]]] = {}
    for stem in stems:
        if match := _TRIMMED.fullmatch(stem):
            found.setdefault(match[1], []).append(((float(match[2]), float(match[3])), stem))
    return found


def _same_times(times: tuple[float, float], segment: Segment) -> bool:
    return abs(times[0] - segment.start) < _SAME_TIME and abs(times[1] - segment.end) < _SAME_TIME
