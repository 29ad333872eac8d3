"""Something-Something V2: the published annotations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipelines.dataset.prepare.annotations import MISSING, as_listing, merge_rows
from pipelines.dataset.prepare.class_names import class_name
from pipelines.dataset.prepare.findings import Findings
from pipelines.dataset.prepare.frame_folders import FRAME_RATE, check_frame_rate, list_frame_folders
from pipelines.dataset.prepare.listing import Listing
from pipelines.dataset.prepare.text_lines import read_json
from pipelines.dataset.prepare.video_index import VideoFileIndex
from pipelines.errors import DataError
from pipelines.formatting import printable

_DIGITS = 9  # of a class's number


def read_labels(path: Path) -> tuple[str, ...]:
    """The class names of `something-something-v2-labels.json`, `{"Approaching something ...": "0", ...}`, by
    number.

    Raises:
        DataError: no such file, another format, or the numbers are not 0 to N - 1, each once.
    """
    document = read_json(path)
    if not isinstance(document, dict) or not document:
        raise DataError(f"{printable(path)}: expected an object of class names with their numbers")
    by_number: dict[int, str] = {}
    known: set[str] = set()
    for name, number in document.items():
        if not str(number).isdecimal() or len(str(number)) > _DIGITS or int(number) in by_number:
            raise DataError(
                f"{printable(path)}, '{printable(name)}': {printable(str(number))} is no new number"
            )
        if not name.strip() or class_name(name) in known:
            raise DataError(f"{printable(path)}, '{printable(name)}': is no new class name")
        known.add(class_name(name))
        by_number[int(number)] = class_name(name)
    if sorted(by_number) != list(range(len(by_number))):
        raise DataError(f"{printable(path)}: the numbers are not 0 to {len(by_number) - 1}")
    return tuple(by_number[number] for number in range(len(by_number)))


def list_something(
    annotations: Path,
    videos: Sequence[Path],
    labels: Path,
    *,
    frames: Sequence[Path] = (),
    fps: float = FRAME_RATE,
) -> Listing:
    """The videos of `something-something-v2-train.json` or `-validation.json` that have a local file
    `ID.webm`, or a folder of JPEG frames `ID`.

    A video's class is its template without the brackets: `Holding [something]` is `Holding something`.

    Args:
        videos: folders to search for files; empty if `frames` is given.
        labels: `something-something-v2-labels.json`, which numbers the classes.
        frames: folders to search, at any depth, for the folders of frames.
        fps: frames per second at which the frames were taken.

    Raises:
        DataError: a file or an entry is wrong, the split has no templates, a class is unknown, no video has a
            file or folder, or `fps` is out of range.
    """
    check_frame_rate(fps)
    findings = Findings()
    names = read_labels(labels)
    document = read_json(annotations)
    if not isinstance(document, list) or not document:
        raise DataError(
            f"{printable(annotations)}: expected a list of videos, such as something-something-v2-train.json"
        )
    known = set(names)

    def rows() -> Iterator[tuple[str, str, str]]:
        for number, entry in enumerate(document):
            video, label = _entry(entry, f"{printable(annotations)}, entry {number}")
            if label not in known:
                raise DataError(
                    f"{printable(annotations)}, entry {number} (id {printable(video)}): '{printable(label)}' "
                    f"is no class of {printable(labels)}"
                )
            yield video, label, f"entry {number}"

    classes = merge_rows(rows(), findings)
    if frames:
        return list_frame_folders(annotations, classes, names, frames, findings, fps=fps)
    index = VideoFileIndex(videos, findings)
    found: list[tuple[Path, str]] = []
    for video, label in classes.items():
        path = index.find((video,))
        if path is None:
            findings.add(MISSING, video)
        else:
            found.append((path, label))
    index.report_unused()
    if not found:
        raise DataError(
            f"{printable(annotations)}: none of its {len(classes)} videos has a file; the first would be "
            f"called {printable(next(iter(classes)))}.webm"
        )
    findings.note(f"{len(found):,} of {len(classes):,} videos of the annotations have a file.")
    return as_listing(found, names, findings)


def _entry(entry: Any, place: str) -> tuple[str, str]:
    """The id and the class name of an entry."""
    if not isinstance(entry, dict) or "id" not in entry:
        raise DataError(f"{place}: expected an object with id and template")
    template = entry.get("template")
    if not isinstance(template, str):
        raise DataError(f"{place}: has no template; the test split is published without labels")
    video = entry["id"]
    if isinstance(video, bool) or not isinstance(video, str | int) or not str(video).strip():
        raise DataError(f"{place}: its id is '{printable(str(video))}'; expected a number")
    return str(video), class_name(template.replace("[", "").replace("]", ""))
