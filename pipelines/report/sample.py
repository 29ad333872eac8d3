"""Videos of a manifest that are opened, evenly over it: sizes, keyframes, defects, and what NVDEC decodes."""

from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipelines.dali.encoded_input import GraphDecoder, UnsupportedByGraph, check_encoded
from pipelines.dataset.manifest import Manifest, ManifestRow
from pipelines.dataset.probe import CRASHES
from pipelines.dataset.source import format_change, open_source
from pipelines.decode.video_file import LONG_FILE
from pipelines.errors import VideoError
from pipelines.worker_pool import Progress, ordered_map


@dataclass(frozen=True, slots=True)
class Opened:
    """A usable video of the sample."""

    index: int
    """Its row."""
    size: int | None
    """Bytes; None of a folder of frames."""
    seconds: float
    """Duration of the row; 0 if the frame rate is unknown."""
    frames: int
    """Of the whole video."""
    keyframe_distance: int
    """Most frames from a keyframe to the next one, or to the end."""
    nvdec_refusal: str
    """Why NVDEC does not decode it; empty if it does."""


@dataclass
class Sample:
    """The opened videos, and those that cannot be used."""

    videos: list[Opened] = field(default_factory=list)
    defects: list[tuple[int, str]] = field(default_factory=list)
    """Row and reason."""

    def __len__(self) -> int:
        return len(self.videos) + len(self.defects)


def open_sample(manifest: Manifest, most: int, *, workers: int, progress: Progress | None = None) -> Sample:
    """Open at most `most` videos: demux each, and decode its first frame.

    Args:
        workers: processes.
        progress: called after each video with the number of those opened and of all.

    Raises:
        DataError: the manifest is damaged where it is read.
    """
    chosen = range(0, len(manifest), max(1, -(-len(manifest) // most)))
    sample = Sample()
    jobs = []
    for index in chosen:
        try:
            jobs.append((index, manifest.path_at(index), manifest.row(index)))
        except VideoError as defect:
            sample.defects.append((index, str(defect)))
    with closing(
        ordered_map(
            _open, jobs, total=len(jobs), workers=workers, progress=progress, on_crash=lambda _: CRASHES
        )
    ) as results:
        for (index, _, _), result in zip(jobs, results, strict=True):
            if isinstance(result, str):
                sample.defects.append((index, result))
            else:
                sample.videos.append(result)
    sample.defects.sort()
    return sample


def _open(job: tuple[int, Path, ManifestRow]) -> Opened | str:
    """The properties of a video, or its defect."""
    index, path, row = job
    source = open_source(path, row)
    try:
        info = source.probe()
        if change := format_change(info, row):
            return change
        size = source.encoded_bytes()
        seconds = row.frames / row.fps if row.fps else 0.0
        refusal = _nvdec_refusal(path, row)
    except VideoError as defect:
        return str(defect)
    return Opened(index, size, seconds, info.frames, info.keyframe_distance, refusal)


def _nvdec_refusal(path: Path, row: ManifestRow) -> str:
    encoded = open_source(path, row).read(np.zeros(1, np.int32)).encoded
    if encoded is None:
        return "is a folder of JPEG frames"
    if not isinstance(encoded, bytes):
        return f"is larger than {LONG_FILE >> 20} MiB"
    try:
        check_encoded(encoded, row, np.array([row.first_frame], np.int32), GraphDecoder.NVDEC)
    except UnsupportedByGraph as refused:
        return str(refused).partition(", which the graph's decoder")[0]
    return ""
