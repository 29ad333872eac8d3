"""ActivityNet 1.3 and HACS Segments: the published JSON, which has one format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.dataset.prepare.class_names import class_name
from pipelines.dataset.prepare.findings import Findings
from pipelines.dataset.prepare.listing import Listing
from pipelines.dataset.prepare.text_lines import read_json
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

SUBSETS = ("training", "validation", "testing")

NOT_ANNOTATED = "videos of the subset without a segment, left out"


def list_activitynet(
    annotations: Path,
    videos: Sequence[Path],
    *,
    subset: str,
    unit: Unit | None = None,
    class_names: Sequence[str] | None = None,
) -> Listing:
    """The segments or videos of a subset that have a local file; see `list_untrimmed`.

    Args:
        annotations: `activity_net.v1-3.min.json` or `HACS_segments_v1.1.1.json`, `{"database": {ID:
            {"subset": NAME, "duration": SECONDS, "annotations": [ANNOTATION, ...]}}}` with annotations of
            `{"segment": [START, END], "label": CLASS}`.
        subset: one of `SUBSETS`.
        unit: by default segments of the training subset, and whole videos of the others, as in the paper
            (appendix A).

    Raises:
        DataError: the file or an entry is wrong, the subset has no labels, or as `list_untrimmed`.
    """
    findings = Findings()
    data = read_database(annotations, subset, findings)
    unit = unit or ("segments" if subset == "training" else "videos")
    return list_untrimmed(data, videos, findings, unit=unit, class_names=class_names)


def read_database(path: Path, subset: str, findings: Findings) -> Untrimmed:
    """The segments of a subset, and the class names of all subsets.

    Raises:
        DataError: the file or an entry is wrong, or no video of the subset has a segment.
    """
    document = read_json(path)
    database = document.get("database") if isinstance(document, dict) else None
    if not isinstance(database, dict) or not database:
        raise DataError(
            f"{printable(path)}: expected an object with `database`, such as activity_net.v1-3.min.json"
        )
    rows: list[Row] = []
    durations: dict[str, float] = {}
    names: set[str] = set()
    videos = 0
    for key, entry in database.items():
        place = f"{printable(path)}, {printable(key)}"
        video = youtube_id(key, place)
        segments = entry.get("annotations") if isinstance(entry, dict) else None
        if not isinstance(segments, list) or entry.get("subset") not in SUBSETS:
            raise DataError(f"{place}: expected annotations, a list, and subset, one of {', '.join(SUBSETS)}")
        chosen = entry["subset"] == subset
        for number, annotation in enumerate(segments):
            where = f"{place}, annotation {number}"
            start, end, label = _annotation(annotation, where)
            names.add(label)
            if chosen:
                rows.append((Segment(video, start, end), label, f"{printable(key)}, annotation {number}"))
        if not chosen:
            continue
        videos += 1
        if video in durations:
            raise DataError(f"{place}: the database has this video twice, with and without v_; remove one")
        durations[video] = parse_seconds(entry.get("duration", 0), f"{place}, duration")
        if durations[video] < 0:
            raise DataError(f"{place}, duration: {durations[video]:g} s is below 0")
        if not segments:
            findings.add(NOT_ANNOTATED, video)
    if not videos:
        raise DataError(f"{printable(path)}: has no video of the subset {subset}")
    if not rows:
        raise DataError(
            f"{printable(path)}: no video of the subset {subset} has a segment; the test subsets are "
            "published without labels. Use the validation subset"
        )
    return Untrimmed(path, rows, tuple(sorted(names)), durations)


def _annotation(annotation: Any, place: str) -> tuple[float, float, str]:
    """Start, end and class of a segment."""
    try:
        start, end = annotation["segment"]
        label = annotation["label"]
        if not isinstance(annotation["segment"], list):
            raise TypeError
    except (TypeError, KeyError, ValueError) as error:
        raise DataError(f"{place}: expected segment, [START, END], and label") from error
    if not isinstance(label, str) or not label.strip():
        raise DataError(f"{place}: its label is no class name")
    return parse_seconds(start, place), parse_seconds(end, place), class_name(label)
