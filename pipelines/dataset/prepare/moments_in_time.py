"""Moments in Time V1: the published annotations."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from pipelines.dataset.prepare.annotations import MISSING, as_listing, merge_rows
from pipelines.dataset.prepare.class_names import class_name, read_class_names
from pipelines.dataset.prepare.findings import Findings
from pipelines.dataset.prepare.listing import Listing
from pipelines.dataset.prepare.text_lines import csv_rows
from pipelines.dataset.prepare.video_extensions import holds
from pipelines.dataset.prepare.video_index import NOT_ANNOTATED, find_videos
from pipelines.errors import DataError
from pipelines.formatting import printable


def list_moments(annotations: Path, videos: Path, categories: Path) -> Listing:
    """The videos of `trainingSet.csv` or `validationSet.csv` that have a local file.

    A row is `CLASS/FILE.mp4,CLASS,agreements,disagreements`. Some releases name the file alone; it then
    belongs to the folder of its class.

    Args:
        videos: the folder of the split, `training` or `validation`, with a folder for each class.
        categories: `moments_categories.txt`, lines of `CLASS,NUMBER`.

    Raises:
        DataError: a file or a row is wrong, a class is not among the categories, or no video has a file.
    """
    if not videos.is_dir():
        raise DataError(f"{printable(videos)}: no such folder")
    findings = Findings()
    names = read_class_names(categories)
    findings.note(names.note)
    known = set(names)

    def rows() -> Iterator[tuple[str, str, str]]:
        for line, row in csv_rows(annotations):
            place = f"{printable(annotations)}, line {line}"
            if len(row) < 2:
                raise DataError(f"{place}: expected CLASS/FILE.mp4,CLASS,agreements,disagreements")
            file, label = row[0].strip(), class_name(row[1])
            if label not in known:
                raise DataError(f"{place}: '{printable(label)}' is no class of {printable(categories)}")
            path = file if "/" in file else f"{label}/{file}"
            if path.startswith("/") or ".." in path.split("/"):
                raise DataError(f"{place}: '{printable(path)}' is outside the folder of the videos")
            if path.endswith("/") or "\0" in path:
                raise DataError(f"{place}: '{printable(file)}' is no file name")
            path = "/".join(part for part in path.split("/") if part not in ("", "."))
            yield path, label, f"line {line}"

    labels = merge_rows(rows(), findings)
    files = cache(_files)  # a folder is listed once: 800,000 calls of stat on a network disk take minutes
    found: list[tuple[Path, str]] = []
    for path, label in labels.items():
        folder, _, name = path.rpartition("/")
        if name in files(videos / folder):
            found.append((videos / path, label))
        else:
            findings.add(MISSING, printable(path))
    for file in find_videos(str(videos), findings):
        if os.path.relpath(file, videos) not in labels:
            findings.add(NOT_ANNOTATED, Path(file))
    if not found:
        first = next(iter(labels), "CLASS/FILE.mp4")
        raise DataError(
            f"{printable(annotations)}: none of its {len(labels)} videos has a file; the first would be "
            f"{printable(videos / first)}"
        )
    findings.note(f"{len(found):,} of {len(labels):,} videos of the annotations have a file.")
    return as_listing(found, names, findings)


def _files(folder: Path) -> frozenset[str]:
    """The names of a folder's files; none where there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if holds(entry.is_file))
    except OSError:
        return frozenset()
