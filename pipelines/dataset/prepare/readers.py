"""A folder or a table, with or without a file of class names, to a listing."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from pipelines.dataset.prepare.class_names import read_class_names
from pipelines.dataset.prepare.findings import Findings
from pipelines.dataset.prepare.folder import read_folder
from pipelines.dataset.prepare.listing import Listing
from pipelines.dataset.prepare.table import read_table
from pipelines.dataset.prepare.table_format import ColumnOptions


def list_folder(root: Path, classes: Path | None, more_extensions: Collection[str] | None) -> Listing:
    """`read_folder`, with the class names of the file `classes`."""
    findings = Findings()
    names = None if classes is None else read_class_names(classes, findings)
    return read_folder(root, names, more_extensions=more_extensions or (), findings=findings)


def list_table(
    table: Path,
    root: Path | None,
    classes: Path | None,
    path: str | None,
    label: str | None,
    weight: str | None,
) -> Listing:
    """`read_table`, with the class names of the file `classes` and the columns that are named."""
    findings = Findings()
    names = None if classes is None else read_class_names(classes, findings)
    return read_table(table, root, names, options=ColumnOptions(path, label, weight), findings=findings)
