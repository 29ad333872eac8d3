"""What a built or checked manifest holds, and what was found on the way, as text of 80 columns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipelines.dataset.manifest import Manifest
from pipelines.dataset.prepare.class_names import printable_class
from pipelines.dataset.prepare.decode_cost import CostSummary
from pipelines.dataset.prepare.findings import Findings
from pipelines.formatting import printable, wrap

_COUNTED = 12
"""Classes whose numbers of videos are given one by one; of more, the smallest and the greatest."""

_NAMED = 8
"""Classes that are named where many are meant."""


@dataclass(slots=True)
class ManifestReport:
    """A manifest, the videos that cannot be used, and what else there is to say."""

    manifest: Manifest
    bad_videos: Findings
    """Those that cannot be used, by reason."""
    fate: str
    """What became of the bad videos, in words that follow `are`."""
    kind: str
    """`bad` of a manifest that was built, `check` of one that was checked: names the list of bad videos."""
    counts: np.ndarray | None = None
    """Videos of each class; None where they are not counted."""
    findings: Findings = field(default_factory=Findings)
    remarks: Findings = field(default_factory=Findings)
    """What the probe said of videos that can be used."""
    cost: CostSummary = field(default_factory=CostSummary)
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    """The content key of each row."""

    @property
    def bad(self) -> int:
        """How many videos cannot be used."""
        return self.bad_videos.listed

    @property
    def bad_list(self) -> Path:
        """`<manifest>.bad.txt`, or `.check.txt` of a check: on each line a file and, after a tab, its defect.
        No bad video, no list."""
        return list_of(self.manifest.path, self.kind)

    @property
    def report(self) -> Path:
        """`<manifest>.report.txt`: what else was found, a line each. Nothing found, no file."""
        return list_of(self.manifest.path, "report")

    def write_lists(self) -> None:
        """Write the list of the bad videos, and for a manifest that was built the report."""
        self.bad_videos.write_list(self.bad_list)
        if self.kind == "bad":
            self.findings.write_list(self.report)

    def summary(self) -> str:
        """All of it as lines; the first says how many videos of how many classes there are."""
        names = self.manifest.class_names
        bad = self.bad
        verb = "is" if bad == 1 else "are"
        holds = f"{_count(len(self.manifest), 'video')} of {_classes(len(names))}"
        lines = [f"{printable(self.manifest.path)}: {holds}"]
        if self.counts is not None:
            lines += _of_classes(self.counts, names)
        if bad:
            lines += [f"{_count(bad, 'bad video')} {verb} {self.fate}, see", f"  {printable(self.bad_list)}:"]
            lines += self.bad_videos.table()
        for note in self.findings.notes:
            lines += wrap(f"Note: {note}")
        found = self.findings.table()
        if found:
            lines += ["Also found, see", f"  {printable(self.report)}:", *found]
        remarks = self.remarks.table()
        if remarks:
            lines += ["Of the videos that were taken:", *remarks]
        return "\n".join(lines + self.cost.lines())


def list_of(manifest: Path, kind: str) -> Path:
    """Where a list beside a manifest lies."""
    return manifest.with_name(f"{manifest.name}.{kind}.txt")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _classes(number: int) -> str:
    return f"{number} class" + ("" if number == 1 else "es")


def _of_classes(counts: np.ndarray, names: tuple[str, ...]) -> list[str]:
    """How many videos each class has; of many classes, the least and the most; and which have none."""
    shown = [printable_class(name) for name in names]
    if len(names) <= _COUNTED:
        lines = wrap(", ".join(f"{name} {count}" for name, count in zip(shown, counts, strict=True)), "  ")
    else:
        least, most = int(np.argmin(counts)), int(np.argmax(counts))
        lines = wrap(
            f"videos of a class: {counts[least]} ({shown[least]}) to {counts[most]} ({shown[most]}), median "
            f"{np.median(counts):g}",
            "  ",
        )
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        named = ", ".join(f"{shown[index]} ({index})" for index in empty[:_NAMED])
        more = f" and {len(empty) - _NAMED} more" if len(empty) > _NAMED else ""
        keep = "keeps its class number" if len(empty) == 1 else "keep their class numbers"
        lines += wrap(f"{_classes(len(empty))} without a video {keep}: {named}{more}", "  ")
        lines += wrap(
            "A model gets an output for each. To leave a class out, take away its folder, or its name in the "
            "file of --classes.",
            "  ",
        )
    return lines
