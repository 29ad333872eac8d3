"""Moments in Time V1: the published annotations."""

from __future__ import annotations

import csv
from pathlib import Path

from pipelines.dataset.prepare.class_names import class_name, read_class_names
from pipelines.dataset.prepare.findings import Findings
from pipelines.dataset.prepare.kinetics import CONTRADICTORY, MISSING, REPEATED, as_listing
from pipelines.dataset.prepare.listing import Listing
from pipelines.dataset.prepare.text_lines import open_lines
from pipelines.errors import DataError
from pipelines.formatting import printable


def list_moments(annotations: Path, videos: Path, categories: Path) -> Listing:
    """The videos of `trainingSet.csv` or `validationSet.csv` that are there.

    A row is `CLASS/FILE.mp4,CLASS,agreements,disagreements`; some releases name the file alone, which is then
    looked for in the folder of its class.

    Args:
        videos: the folder of the split, `training` or `validation`, with a folder for each class.
        categories: `moments_categories.txt`, lines of `CLASS,NUMBER`.

    Raises:
        DataError: a file or a row is wrong, a class is not among the categories, or no video is there.
    """
    findings = Findings()
    names = read_class_names(categories)
    findings.note(names.note)
    known = set(names)
    if not annotations.is_file():
        raise DataError(f"{printable(annotations)}: no such file")
    labels: dict[str, str] = {}
    contradictory: set[str] = set()
    with open_lines(annotations) as lines:
        rows = csv.reader(lines)
        for row in rows:
            if not row:
                continue
            place = f"{printable(annotations)}, line {rows.line_num}"
            if len(row) < 2:
                raise DataError(f"{place}: expected CLASS/FILE.mp4,CLASS,agreements,disagreements")
            file, label = row[0].strip(), class_name(row[1])
            if label not in known:
                raise DataError(f"{place}: '{printable(label)}' is no class of {printable(categories)}")
            path = file if "/" in file else f"{label}/{file}"
            if path not in labels:
                labels[path] = label
            elif labels[path] == label:
                findings.add(REPEATED, printable(path))
            else:
                contradictory.add(path)
                findings.add(CONTRADICTORY, printable(path), f"'{labels[path]}' and '{label}'; {place}")
    found: list[tuple[Path, str]] = []
    for path, label in labels.items():
        if path in contradictory:
            continue
        whole = videos / path
        if whole.is_file():
            found.append((whole, label))
        else:
            findings.add(MISSING, printable(path))
    if not found:
        first = next(iter(labels), "CLASS/FILE.mp4")
        raise DataError(
            f"{printable(annotations)}: none of its {len(labels)} videos is there; the first is looked for "
            f"at "
            f"{printable(videos / first)}"
        )
    findings.note(f"{len(found):,} of {len(labels):,} videos of the annotations are there.")
    return as_listing(found, names, findings)
