"""The report on a manifest that was built or checked, and its summary in 80 columns."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from pipelines.dataset.manifest import Manifest
from pipelines.dataset.prepare.class_names import printable_class
from pipelines.dataset.prepare.decode_cost import CostSummary
from pipelines.dataset.prepare.findings import Findings
from pipelines.formatting import format_count, format_list, printable, wrap

_COUNTED = 12  # classes up to which each has its count in the summary; of more, the least and the most
_NAMED = 8  # classes without a video that the summary names


@dataclass(slots=True)
class ManifestReport:
    """A manifest, the videos that cannot be used, and what else the user should know."""

    manifest: Manifest
    bad_videos: Findings
    """The videos that cannot be used, by defect."""
    kind: Literal["bad", "check"]
    """`bad` for a manifest that was built, `check` for one that was checked; part of the list's file name."""
    counts: np.ndarray | None = None
    """Number of videos of each class; None if they are not counted."""
    findings: Findings = field(default_factory=Findings)
    properties: Findings = field(default_factory=Findings)
    """Unusual properties of usable videos."""
    cost: CostSummary = field(default_factory=CostSummary)
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    """The content key of each row."""

    @property
    def bad(self) -> int:
        """Number of videos that cannot be used."""
        return self.bad_videos.total

    @property
    def bad_list(self) -> Path:
        """`<manifest>.bad.txt`, or `.check.txt` for a check; only if there are bad videos."""
        return list_of(self.manifest.path, self.kind)

    @property
    def report(self) -> Path:
        """`<manifest>.report.txt`, with the items of `findings`; only if there are any."""
        return list_of(self.manifest.path, "report")

    def write_lists(self) -> None:
        """Write the list of bad videos and, for a manifest that was built, the list of findings."""
        self.bad_videos.write_list(self.bad_list)
        if self.kind == "bad":
            self.findings.write_list(self.report)

    def summary(self) -> str:
        """The report as lines of text."""
        names = self.manifest.class_names
        counts = f"{format_count(len(self.manifest), 'video')} of {format_count(len(names), 'class')}"
        lines = [f"{printable(self.manifest.path)}: {counts}"]
        if self.counts is not None:
            lines += _format_classes(self.counts, names)
        if self.bad:
            verb = "is" if self.bad == 1 else "are"
            fate = "left out" if self.kind == "bad" else "still in the manifest"
            lines.append(f"{format_count(self.bad, 'bad video')} {verb} {fate}, listed in")
            lines += [f"  {printable(self.bad_list)}:", *self.bad_videos.table()]
        for note in self.findings.notes:
            lines += wrap(f"Note: {note}")
        found = self.findings.table()
        if found:
            lines += ["Other findings, listed in", f"  {printable(self.report)}:", *found]
        properties = self.properties.table()
        if properties:
            lines += ["Unusual videos in the manifest:", *properties]
        return "\n".join(lines + self.cost.lines())


def list_of(manifest: Path, kind: str) -> Path:
    """The path of a list beside a manifest."""
    return manifest.with_name(f"{manifest.name}.{kind}.txt")


def _format_classes(counts: np.ndarray, names: tuple[str, ...]) -> list[str]:
    """The number of videos of each class, or the least and the most of many classes; the empty classes."""
    printed = [printable_class(name) for name in names]
    if len(names) <= _COUNTED:
        lines = wrap(", ".join(f"{name} {count}" for name, count in zip(printed, counts, strict=True)), "  ")
    else:
        least, most = int(np.argmin(counts)), int(np.argmax(counts))
        lines = wrap(
            f"videos per class: {counts[least]} ({printed[least]}) to {counts[most]} ({printed[most]}), "
            f"median {np.median(counts):g}",
            "  ",
        )
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        named = format_list([f"{printed[index]} ({index})" for index in empty[:_NAMED]], _NAMED, len(empty))
        keep = "keeps its class number" if len(empty) == 1 else "keep their class numbers"
        lines += wrap(f"{format_count(len(empty), 'class')} without a video {keep}: {named}", "  ")
        lines += wrap(
            "The model has an output for each. To remove a class, remove it where the class names come "
            "from: its folder, or its line in their file.",
            "  ",
        )
    return lines
