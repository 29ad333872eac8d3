"""Something-Something V1: the published annotations, and a folder of JPEG frames per video."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pipelines.dataset.prepare.annotations import merge_rows
from pipelines.dataset.prepare.class_names import class_name
from pipelines.dataset.prepare.findings import Findings
from pipelines.dataset.prepare.frame_folders import FRAME_RATE, check_frame_rate, list_frame_folders
from pipelines.dataset.prepare.listing import Listing
from pipelines.dataset.prepare.text_lines import is_utf8, open_lines
from pipelines.errors import DataError
from pipelines.formatting import printable


def read_labels(path: Path) -> tuple[str, ...]:
    """The class names of `something-something-v1-labels.csv`, a name per line, in alphabetical order.

    The file has no numbers. Published lists and models number the classes in this order.

    Raises:
        DataError: no such file, no name in it, or one twice.
    """
    names: dict[str, int] = {}
    for number, line in _lines(path):
        name = class_name(line)
        if name in names:
            raise DataError(
                f"{printable(path)}, line {number}: '{printable(name)}' is already in line {names[name]}"
            )
        names[name] = number
    if not names:
        raise DataError(f"{printable(path)}: has no class name; expected one per line")
    return tuple(sorted(names))


def list_something_v1(
    annotations: Path, frames: Sequence[Path], labels: Path, *, fps: float = FRAME_RATE
) -> Listing:
    """The videos of `something-something-v1-train.csv` or `-validation.csv` that have a folder of frames.

    A line is `ID;CLASS`. The frames are `ID/00001.jpg`, `ID/00002.jpg`, ... below one of the folders.

    Args:
        frames: folders to search, at any depth, for the folders of the videos.
        labels: `something-something-v1-labels.csv`.
        fps: frames per second at which the frames were taken.

    Raises:
        DataError: a file or a line is wrong, the split has no labels, a class is unknown, no video has a
            folder, or `fps` is out of range.
    """
    check_frame_rate(fps)
    findings = Findings()
    names = read_labels(labels)
    known = set(names)

    def rows() -> Iterator[tuple[str, str, str]]:
        for number, line in _lines(annotations):
            video, separator, text = line.partition(";")
            place = f"{printable(annotations)}, line {number}"
            if not separator:
                raise DataError(
                    f"{place}: expected ID;CLASS, found '{printable(line)}'. The test split is published "
                    "without labels"
                )
            label = class_name(text)
            if label not in known:
                raise DataError(f"{place}: '{printable(label)}' is no class of {printable(labels)}")
            if not video.strip():
                raise DataError(f"{place}: expected ID;CLASS, found '{printable(line)}'")
            yield video.strip(), label, f"line {number}"

    classes = merge_rows(rows(), findings)
    if not classes:
        raise DataError(f"{printable(annotations)}: no video in it")
    return list_frame_folders(annotations, classes, names, frames, findings, fps=fps)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not blank. Raises DataError if the file cannot be read."""
    try:
        with open_lines(path) as lines:
            for number, line in enumerate(lines, 1):
                if text := line.strip():
                    if "\0" in text or not is_utf8(text):
                        raise DataError(
                            f"{printable(path)}, line {number}: '{printable(text)}' is not UTF-8 text; save "
                            "the file as UTF-8"
                        )
                    yield number, text
    except OSError as error:
        raise DataError(f"{printable(path)}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{printable(path)}: cannot be read as text: {error}") from error
