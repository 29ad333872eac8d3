"""What readers of published annotations share: repeated and contradictory rows, the listing."""

from __future__ import annotations

import re
from array import array
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from pipelines.dataset.manifest import SourceKind
from pipelines.dataset.prepare.findings import Findings
from pipelines.dataset.prepare.listing import Listing
from pipelines.formatting import format_list, printable

Key = TypeVar("Key", bound=Hashable)

# Kinds of findings. Each counts clips: one that three rows name is counted once.
MISSING = "clips without a local file, left out"
REPEATED = "clips that the annotations list more than once, used once"
CONTRADICTORY = "clips with two labels, left out"

YOUTUBE_ID = re.compile(r"[A-Za-z0-9_-]{11}")

_PLACES = 5  # rows that a line of the report names


def merge_rows(rows: Iterable[tuple[Key, str, str]], findings: Findings) -> dict[Key, str]:
    """The label of each clip, in the order of the first rows. Those with two labels are left out.

    A clip that several rows name is one finding: `REPEATED` where all give one label, else `CONTRADICTORY`.
    The list names the rows.

    Args:
        rows: what identifies the clip, with a text for messages; its label; and the row's place, such as
            `line 3`.
    """
    labels: dict[Key, str] = {}
    first_places: dict[Key, str] = {}
    further: dict[Key, list[tuple[str, str]]] = {}
    for key, label, place in rows:
        if key in labels:
            further.setdefault(key, []).append((label, place))
        else:
            labels[key] = label
            first_places[key] = place
    for key, others in further.items():
        label = labels[key]
        places = format_list([first_places[key], *(place for _, place in others)], _PLACES)
        given = list(dict.fromkeys([label, *(other for other, _ in others)]))
        if len(given) > 1:
            del labels[key]
            named = " and ".join(f"'{printable(name)}'" for name in given)
            findings.add(CONTRADICTORY, printable(str(key)), f"labels {named} ({places})")
        else:
            findings.add(REPEATED, printable(str(key)), f"{REPEATED} ({places})")
    return labels


def as_listing(
    videos: Sequence[tuple[Path, str]],
    names: Sequence[str],
    findings: Findings,
    *,
    source: SourceKind = SourceKind.FILE,
    fps: float = 0.0,
) -> Listing:
    """Files or folders of frames with class names as a listing, sorted by label and path."""
    labels = {name: label for label, name in enumerate(names)}
    ordered = sorted((labels[name], str(path)) for path, name in videos)
    return Listing(
        [path for _, path in ordered],
        array("l", [label for label, _ in ordered]),
        tuple(names),
        source=source,
        fps=fps,
        findings=findings,
    )
