"""Kinetics-710: the training splits of Kinetics-400, -600 and -700 merged, without held-out videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.dataset import kinetics710
from pipelines.dataset.prepare.annotations import CONTRADICTORY, as_listing
from pipelines.dataset.prepare.findings import Findings
from pipelines.dataset.prepare.kinetics import Clip, Span, local_files, read_annotations, unique_clips
from pipelines.dataset.prepare.listing import Listing
from pipelines.dataset.prepare.video_index import VideoFileIndex
from pipelines.errors import DataError
from pipelines.formatting import printable

PAPER_TRAINING_VIDEOS = 658_340
"""Training videos of the authors' download (paper, table 10)."""

HELD_OUT = "clips of a video that a validation or test split holds, left out"
SHARED = "clips that another training split has with the same class, used once"


@dataclass(slots=True)
class Union:
    """The merged training clips, and how many rows each cause removed."""

    clips: list[Clip] = field(default_factory=list)
    """Each clip once, with its class of the union."""
    others: list[Clip] = field(default_factory=list)
    """The clips of the held-out annotations, and the training clips that are left out."""
    rows: int = 0
    """Rows of all training annotations, each clip once per file."""
    held_out: int = 0
    """Rows of a video that a validation or test split holds."""
    shared: int = 0
    """Rows of a clip that an earlier file has with the same class."""
    contradictory: int = 0
    """Rows of clips to which two files give different classes."""

    def summary(self) -> str:
        """The figures beside the paper's, as one sentence."""
        return (
            f"{self.rows:,} rows of the training splits: {self.held_out:,} of held-out videos, "
            f"{self.shared:,} repeated and {self.contradictory:,} contradictory ones are left out; "
            f"{len(self.clips):,} clips remain (the authors' download: {PAPER_TRAINING_VIDEOS:,})."
        )


def merge_training_splits(train: Sequence[Path], held_out: Sequence[Path], findings: Findings) -> Union:
    """Training clips of all files, each once, without held-out videos.

    A clip is identified by its video and times: two clips of one video at different times are both kept.
    Labels are mapped to those of the union as in table 20 of the paper.

    Args:
        train: training annotations of the versions to merge.
        held_out: validation and test annotations, also those without labels.

    Raises:
        DataError: a file or a row is wrong, or a label is no class of Kinetics.
    """
    synonyms, known = kinetics710.synonyms(), set(kinetics710.class_names("k710"))
    union = Union(others=[clip for path in held_out for clip in read_annotations(path)])
    ids = {clip.span.youtube_id for clip in union.others}
    labels: dict[Span, list[str]] = {}
    for path in train:
        for clip in unique_clips(read_annotations(path), findings):
            label = synonyms.get(clip.label, clip.label)
            if label not in known:
                what = f"'{printable(clip.label)}' is no class of Kinetics" if clip.label else "has no label"
                raise DataError(f"{printable(path)}, {clip}: {what}")
            union.rows += 1
            if clip.span.youtube_id in ids:
                union.held_out += 1
                union.others.append(clip)
                findings.add(HELD_OUT, str(clip), f"{HELD_OUT}; a row of {printable(path)}")
            else:
                labels.setdefault(clip.span, []).append(label)
    for span, given in labels.items():
        clip = Clip(span, given[0])
        if len(set(given)) > 1:
            union.contradictory += len(given)
            union.others.append(clip)
            findings.add(
                CONTRADICTORY,
                str(clip),
                "labels " + " and ".join(f"'{printable(name)}'" for name in dict.fromkeys(given)),
            )
            continue
        union.clips.append(clip)
        union.shared += len(given) - 1
        if len(given) > 1:
            findings.count(SHARED, str(clip))
    return union


def list_kinetics710(train: Sequence[Path], held_out: Sequence[Path], videos: Sequence[Path]) -> Listing:
    """The clips of Kinetics-710 that have a local file, with labels in the order of
    `kinetics710.class_names`. Files that no annotation names are among the findings.

    Args:
        train, held_out: as for `merge_training_splits`.
        videos: folders of the versions' videos, as for `list_kinetics`.

    Raises:
        DataError: as `merge_training_splits`, or no clip has a file.
    """
    findings = Findings()
    union = merge_training_splits(train, held_out, findings)
    findings.note(union.summary())
    if not union.clips:
        raise DataError(f"no clip remains. {union.summary()}")
    index = VideoFileIndex(videos, findings)
    found = local_files(union.clips, index, findings)
    for clip in union.others:
        for stem in (*clip.stems(), clip.span.youtube_id):
            index.find((stem,))
    index.report_unused()
    if not found:
        raise DataError(
            f"none of the {len(union.clips)} clips has a file among the {len(index)} videos of "
            f"{', '.join(map(printable, videos))}; files are called ID_START_END.mp4 or ID.mp4"
        )
    findings.note(f"{len(found):,} of these clips have a file.")
    names = kinetics710.class_names("k710")
    return as_listing([(path, clip.label) for clip, path in found], names, findings)
