"""HACS Clips: the published CSV, of 2-second clips that show an action or do not. HACS Segments: see
`activitynet`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pipelines.dataset.prepare.activitynet import SUBSETS, list_activitynet
from pipelines.dataset.prepare.annotations import CONTRADICTORY
from pipelines.dataset.prepare.class_names import class_name
from pipelines.dataset.prepare.findings import Findings
from pipelines.dataset.prepare.listing import Listing
from pipelines.dataset.prepare.text_lines import check_fields, csv_rows, find_columns
from pipelines.dataset.prepare.untrimmed import (
    Row,
    Segment,
    Unit,
    Untrimmed,
    list_untrimmed,
    parse_seconds,
    youtube_id,
)
from pipelines.errors import DataError
from pipelines.formatting import printable

COLUMNS = ("classname", "youtube_id", "subset", "start", "end", "label")

NEGATIVE = "clips that do not show the action (label -1), left out"


def list_hacs(
    annotations: Path,
    videos: Sequence[Path],
    *,
    subset: str,
    unit: Unit | None = None,
    class_names: Sequence[str] | None = None,
) -> Listing:
    """HACS Segments, if the file is JSON (see `list_activitynet`), or the positive clips of HACS Clips.

    Args:
        annotations: `HACS_segments_v1.1.1.json` or `HACS_clips_v1.1.1.csv`.
        unit: of HACS Clips, segments by default in every subset.

    Raises:
        DataError: as `list_activitynet`.
    """
    if annotations.suffix.lower() == ".json":
        return list_activitynet(annotations, videos, subset=subset, unit=unit, class_names=class_names)
    findings = Findings()
    data = read_clips(annotations, subset, findings)
    return list_untrimmed(data, videos, findings, unit=unit or "segments", class_names=class_names)


def read_clips(path: Path, subset: str, findings: Findings) -> Untrimmed:
    """The positive clips of a subset, and the class names of all subsets.

    A clip that the file calls both positive and negative for one class is left out and listed.

    Raises:
        DataError: the file or a row is wrong, or the subset has no positive clip.
    """
    positive: list[Row] = []
    names: set[str] = set()
    for segment, name, split, shows, line in _rows(path):
        names.add(name)
        if split != subset:
            continue
        if shows:
            positive.append((segment, name, f"line {line}"))
        else:
            findings.count(NEGATIVE, f"{segment} ('{printable(name)}')")
    shown = {(segment, name): place for segment, name, place in positive}
    both: set[tuple[Segment, str]] = set()
    for segment, name, split, shows, line in _rows(path):
        key = segment, name
        if split == subset and not shows and key in shown and key not in both:
            both.add(key)
            label = printable(name)
            findings.add(
                CONTRADICTORY, str(segment), f"'{label}' and not '{label}' ({shown[key]}, line {line})"
            )
    rows = [row for row in positive if row[:2] not in both]
    if not rows:
        raise DataError(f"{printable(path)}: has no positive clip of the subset {subset}")
    return Untrimmed(path, rows, tuple(sorted(names)))


def _rows(path: Path) -> Iterator[tuple[Segment, str, str, bool, int]]:
    """Segment, class, subset, whether it shows the action, and line of each row."""
    rows = csv_rows(path)
    header = [name.strip().lower() for name in next(rows, (0, []))[1]]
    if not set(COLUMNS) <= set(header):
        raise DataError(
            f"{printable(path)}, line 1: found {printable(','.join(header)) or 'an empty file'}; expected "
            f"{','.join(COLUMNS)}"
        )
    columns = find_columns(path, header, COLUMNS)
    for line, row in rows:
        place = f"{printable(path)}, line {line}"
        check_fields(row, header, columns, place)
        name, video, subset, start, end, label = (row[columns[each]].strip() for each in COLUMNS)
        if subset not in SUBSETS:
            raise DataError(f"{place}: '{printable(subset)}' is no subset; expected {', '.join(SUBSETS)}")
        if label not in ("1", "-1"):
            raise DataError(f"{place}: the label is '{printable(label)}'; expected 1 or -1")
        if not name:
            raise DataError(f"{place}: the class name is empty")
        segment = Segment(youtube_id(video, place), parse_seconds(start, place), parse_seconds(end, place))
        yield segment, class_name(name), subset, label == "1", line
