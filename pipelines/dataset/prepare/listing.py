"""The labelled videos of a folder, table or annotation file, before the videos are probed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path

from pipelines.dataset.manifest import SourceKind
from pipelines.dataset.prepare.findings import Findings
from pipelines.dataset.prepare.probe_row import ListedRow


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
    source: SourceKind = SourceKind.FILE
    """What the paths name."""
    fps: float = 0.0
    """Frames per second of folders of frames, whose files have no times."""
    segments: Sequence[tuple[float, float] | None] | None = None
    """For each path, the seconds of the video that its row shows; None for the whole video."""
    durations: Sequence[float] | None = None
    """For each path, the length of the whole video in seconds by the annotations; 0 if it is unknown."""

    def __len__(self) -> int:
        return len(self.paths)

    def rows(self) -> Iterator[ListedRow]:
        """What to probe, in order."""
        segments = repeat(None) if self.segments is None else self.segments
        durations = repeat(0.0) if self.durations is None else self.durations
        for path, seconds, duration in zip(self.paths, segments, durations, strict=False):
            yield ListedRow(Path(path), self.source, seconds, duration)

    def __iter__(self) -> Iterator[tuple[Path, int]]:
        return zip(map(Path, self.paths), self.labels, strict=True)
