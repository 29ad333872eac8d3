"""The labelled videos of a folder or table, before the videos are probed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.dataset.prepare.findings import Findings


@dataclass(frozen=True, slots=True)
class Listing:
    """Videos with their labels, in the order of the manifest. A million videos take 150 MB."""

    paths: Sequence[str]
    labels: Sequence[int]
    """For each path, an index into the class names."""
    class_names: tuple[str, ...]
    weights: Sequence[float] | None = None
    """How often training draws each video relative to the others; None: all equally often."""
    lines: Sequence[int] | None = None
    """For each path, its line in the table; None if there is no table."""
    findings: Findings = field(default_factory=Findings)
    """What the reader skipped, and what it interpreted in a way that the user should know."""

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[tuple[Path, int]]:
        return zip(map(Path, self.paths), self.labels, strict=True)
