"""What a reader of an annotation format hands over, before anyone has looked into the videos."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

from pipelines.dataset.prepare.findings import Findings


class Videos(Sequence[tuple[Path, int]]):
    """Files with their labels, held as text and numbers: a million take about 150 MB, not a gigabyte."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.labels: Sequence[int] = array("l")

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> tuple[Path, int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[Path, int]]: ...
    def __getitem__(self, index: int | slice) -> tuple[Path, int] | list[tuple[Path, int]]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return Path(self.paths[index]), int(self.labels[index])


@dataclass(frozen=True, slots=True)
class Listing:
    """Videos with their labels, in the order they will have in the manifest."""

    videos: Sequence[tuple[Path, int]]
    """Each video's file and its label, an index into the class names."""
    class_names: tuple[str, ...]
    weights: Sequence[float] | None = None
    """How often training draws each video, compared with the others; None is all equally often."""
    lines: Sequence[int] | None = None
    """The line of the table that each video stands in; None where there is no table."""
    findings: Findings = field(default_factory=Findings)
    """What the reader left out, and what it took in a way that its user should know."""
