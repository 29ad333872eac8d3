"""Kinetics-400, -600 and -700: the published annotations, and the local file of each clip."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pipelines.dataset import kinetics710
from pipelines.dataset.prepare.annotations import MISSING, YOUTUBE_ID, as_listing, merge_rows
from pipelines.dataset.prepare.class_names import class_name
from pipelines.dataset.prepare.findings import Findings
from pipelines.dataset.prepare.listing import Listing
from pipelines.dataset.prepare.text_lines import check_fields, csv_rows, find_columns, read_json
from pipelines.dataset.prepare.video_index import VideoFileIndex
from pipelines.errors import DataError
from pipelines.formatting import format_list, printable

VERSIONS: dict[str, kinetics710.Table] = {"400": "k400", "600": "k600", "700": "k700"}

_COLUMNS = ("youtube_id", "time_start", "time_end", "label")

# Kinds of findings: a count follows.
AMBIGUOUS = "clips of a video whose only file has no times in its name, left out"


class Span(NamedTuple):
    """Seconds `start` to `end` of a YouTube video."""

    youtube_id: str
    start: int
    end: int

    def __str__(self) -> str:
        return f"{self.youtube_id} {self.start}-{self.end} s"


@dataclass(frozen=True, slots=True)
class Clip:
    """A row of the annotations."""

    span: Span
    label: str
    """The class name; empty in a test split that is published without labels."""
    place: str = field(default="", compare=False)
    """Where its row is: `line 3`, or the key in a JSON file."""

    def __str__(self) -> str:
        return str(self.span)

    def stems(self) -> Iterator[str]:
        """Names that download programs give the trimmed clip."""
        youtube_id, start, end = self.span
        yield f"{youtube_id}_{start:06d}_{end:06d}"
        yield f"{youtube_id}_{start}_{end}"


def read_annotations(path: Path) -> Iterator[Clip]:
    """The clips of a published file: CSV with the header `label,youtube_id,time_start,time_end,split`, in any
    order and with further columns, or the JSON of the same data.

    Raises:
        DataError: no such file, another format, or a wrong value, with its line or its key.
    """
    yield from _read_json(path) if path.suffix.lower() == ".json" else _read_csv(path)


def _read_csv(path: Path) -> Iterator[Clip]:
    rows = csv_rows(path)
    header = [name.strip().lower() for name in next(rows, (0, []))[1]]
    for column in ("youtube_id", "time_start", "time_end"):
        if column not in header:
            found = printable(",".join(header)) if header else "an empty file"
            raise DataError(
                f"{printable(path)}, line 1: no column {column}; found {found}; expected "
                "label,youtube_id,time_start,time_end,split. For a list of paths and labels use prepare table"
            )
    columns = find_columns(path, header, _COLUMNS)
    for line, row in rows:
        place = f"{printable(path)}, line {line}"
        check_fields(row, header, columns, place)
        fields = {name: row[index].strip() for name, index in columns.items()}
        times = fields["time_start"], fields["time_end"]
        yield _clip(fields["youtube_id"], *times, fields.get("label", ""), path, f"line {line}")


def _read_json(path: Path) -> Iterator[Clip]:
    document = read_json(path)
    if not isinstance(document, dict):
        raise DataError(f"{printable(path)}: expected an object with a YouTube id as each key")
    for name, entry in document.items():
        place = f"{printable(path)}, {printable(name)}"
        try:
            annotations = entry["annotations"]
            start, end = annotations["segment"]
            if not isinstance(annotations["segment"], list):
                raise TypeError
        except (TypeError, KeyError, ValueError) as error:
            raise DataError(f"{place}: expected annotations with segment: [start, end]") from error
        yield _clip(name, start, end, annotations.get("label", ""), path, printable(name))


def _clip(youtube_id: str, start: object, end: object, label: object, path: Path, where: str) -> Clip:
    place = f"{printable(path)}, {where}"
    if not YOUTUBE_ID.fullmatch(youtube_id):
        raise DataError(f"{place}: '{printable(youtube_id)}' is no YouTube id of 11 characters")
    try:
        first, last = float(str(start)), float(str(end))
        if not 0 <= first < last < 10**6:
            raise ValueError
    except ValueError:
        shown = printable(f"{start} to {end}")
        raise DataError(
            f"{place}: {shown} is no time span; expected seconds, with start before end"
        ) from None
    span = Span(youtube_id, round(first), round(last))
    return Clip(span, class_name(str(label)) if label else "", where)


def find_version(labels: Collection[str]) -> str | None:
    """`400`, `600` or `700` if these are exactly its classes; None for any other set."""
    for version, table in VERSIONS.items():
        if set(labels) == set(kinetics710.class_names(table)):
            return version
    return None


def unique_clips(clips: Iterable[Clip], findings: Findings) -> list[Clip]:
    """Each clip once, in the order of the rows. Clips with two labels are left out and listed."""
    labels = merge_rows(((clip.span, clip.label, clip.place) for clip in clips), findings)
    return [Clip(span, label) for span, label in labels.items()]


def local_files(
    clips: Collection[Clip], index: VideoFileIndex, findings: Findings
) -> list[tuple[Clip, Path]]:
    """The clips that have a local file, with its path. A file named by the id alone is used if there is one
    clip of its video."""
    clips_of_video: dict[str, int] = {}
    for clip in clips:
        clips_of_video[clip.span.youtube_id] = clips_of_video.get(clip.span.youtube_id, 0) + 1
    found = []
    for clip in clips:
        path = index.find(clip.stems())
        if path is None and (whole := index.find((clip.span.youtube_id,))) is not None:
            if clips_of_video[clip.span.youtube_id] > 1:
                findings.add(AMBIGUOUS, str(clip), f"which of its clips {printable(whole)} holds is unknown")
                continue
            path = whole
        if path is None:
            findings.add(MISSING, str(clip))
        else:
            found.append((clip, path))
    return found


def list_kinetics(annotations: Path, videos: Sequence[Path], *, version: str | None = None) -> Listing:
    """The clips of one published annotation file that have a local file.

    A label is the index of the class in the alphabetical table of the version. Rows without a file, repeated
    and contradictory rows, and files without a row are among the findings.

    Args:
        annotations: CSV or JSON, as published.
        videos: folders to search, at any depth, for `ID_START_END.*` (`ID_000010_000020.mp4`) or `ID.*`.
        version: `400`, `600` or `700`; by default the one whose classes are exactly those of the annotations.

    Raises:
        DataError: a file or a row is wrong, the split has no labels, the version is unknown, a label is not
            in its table, or no clip has a file.
    """
    findings = Findings()
    clips = unique_clips(read_annotations(annotations), findings)
    if not clips:
        raise DataError(f"{printable(annotations)}: no clip in it")
    unlabelled = next((clip for clip in clips if not clip.label), None)
    if unlabelled is not None and any(clip.label for clip in clips):
        raise DataError(f"{printable(annotations)}, {unlabelled}: has no label")
    if unlabelled is not None:
        raise DataError(
            f"{printable(annotations)}: has no labels: the test splits of Kinetics-600 and -700 are "
            "published without labels. Use the validation split"
        )
    names = _class_names(annotations, {clip.label for clip in clips}, version)
    index = VideoFileIndex(videos, findings)
    found = local_files(clips, index, findings)
    index.report_unused()
    if not found:
        shown = next(clips[0].stems())
        raise DataError(
            f"{printable(annotations)}: none of its {len(clips)} clips has a file among the {len(index)} "
            f"videos of {', '.join(map(printable, videos))}; the first would be called {shown}.mp4 or "
            f"{clips[0].span.youtube_id}.mp4"
        )
    findings.note(f"{len(found):,} of {len(clips):,} clips of the annotations have a file.")
    return as_listing([(path, clip.label) for clip, path in found], names, findings)


def _class_names(annotations: Path, labels: set[str], version: str | None) -> tuple[str, ...]:
    version = version or find_version(labels)
    if version is None:
        raise DataError(
            f"{printable(annotations)}: its {len(labels)} classes are not exactly those of Kinetics-400, "
            "-600 or -700; name the version with --version, or use prepare table"
        )
    names = kinetics710.class_names(VERSIONS[version])
    unknown = sorted(labels - set(names))
    if unknown:
        shown = format_list([f"'{printable(name)}'" for name in unknown], 5)
        raise DataError(f"{printable(annotations)}: no class of Kinetics-{version}: {shown}")
    return names
