"""Clips per second of the training loader on this machine, before and after transcoding some videos."""

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipelines.benchmark.measure import measure_in_subprocess
from pipelines.benchmark.task import THIS_LOADER, BenchmarkTask
from pipelines.benchmark.workload import Workload
from pipelines.dataset.manifest import Manifest, encode_path, write_manifest
from pipelines.dataset.prepare.build import build_manifest
from pipelines.dataset.prepare.transcode import TranscodeOptions, transcode_manifest
from pipelines.dataset.source import open_source
from pipelines.errors import DataError
from pipelines.storage.object_store import is_url
from pipelines.worker_pool import ProgressOf

FRAMES, SIZE = 8, 224
"""Of the clips that are measured."""

_WARM_UP = 2.0  # seconds
_BATCH = 8


@dataclass(frozen=True)
class Speed:
    """Clips per second of all cores together."""

    clips_per_second: float = 0.0
    decode_ms: float = 0.0
    """CPU milliseconds of decoding per clip."""
    other_ms: float = 0.0
    """CPU milliseconds of everything else per clip."""
    others: float = 0.0
    """Share of the cores' time that other programs used meanwhile."""
    problem: str = ""
    """Why it was not measured; empty if it was."""

    @property
    def cpu_ms(self) -> float:
        """CPU milliseconds per clip."""
        return self.decode_ms + self.other_ms


@dataclass(frozen=True)
class Gain:
    """What transcoding changes, measured on some videos."""

    videos: int
    before: Speed
    after: Speed
    options: TranscodeOptions
    seconds: float
    """To transcode the videos, with all cores."""
    bytes_before: int
    bytes_after: int
    problem: str = ""
    """Why nothing was measured; empty if it was."""

    @property
    def factor(self) -> float:
        """CPU time of a clip before transcoding, over that after it; 0 if they were not measured.

        Unlike clips per second, it hardly depends on what other programs do meanwhile.
        """
        measured = not (self.problem or self.before.problem or self.after.problem)
        return self.before.cpu_ms / self.after.cpu_ms if measured else 0.0


def measure_speed(manifest: Manifest, rows: Sequence[int], seconds: float) -> Speed:
    """Clips of `FRAMES` frames of `SIZE` pixels a second from these rows, decoded with PyAV on all cores."""
    with tempfile.TemporaryDirectory() as folder:
        return _measure(_part(manifest, rows, Path(folder) / "sample.arrow"), seconds)


def measure_gain(
    manifest: Manifest, rows: Sequence[int], seconds: float, *, workers: int, progress_of: ProgressOf
) -> Gain:
    """Transcode these rows into a temporary folder, and measure the loader on both.

    Args:
        seconds: of each measurement.
        workers: processes that encode.
    """
    options = TranscodeOptions()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        part = _part(manifest, rows, folder / "sample.arrow")
        begin = time.monotonic()
        try:
            with progress_of("transcoding a sample") as progress:
                listing = transcode_manifest(
                    part, folder / "small", options, workers=workers, progress=progress
                )
            took = time.monotonic() - begin
            small = build_manifest(folder / "small" / "small.arrow", listing, workers=1).manifest
        except (DataError, OSError) as error:
            return Gain(0, Speed(), Speed(), options, 0.0, 0, 0, " ".join(str(error).split()))
        return Gain(
            len(small), _measure(part, seconds), _measure(small, seconds), options, took,
            _bytes(part), _bytes(small),
        )  # fmt: skip


def _part(manifest: Manifest, rows: Sequence[int], path: Path) -> Manifest:
    """A manifest of these rows, which must be valid, at `path`."""
    chosen = [manifest.row(index) for index in rows]
    chosen = [
        row if is_url(row.path) else replace(row, path=encode_path(manifest.absolute_path(row)))
        for row in chosen
    ]
    sources = any(row.source or row.is_segment for row in chosen)
    return write_manifest(path, chosen, manifest.class_names, sources=sources)


def _measure(manifest: Manifest, seconds: float) -> Speed:
    workload = Workload(str(manifest.path), "sample", FRAMES, size=SIZE, batch=min(_BATCH, len(manifest)))
    cores = tuple(sorted(os.sched_getaffinity(0)))
    result = measure_in_subprocess(BenchmarkTask(THIS_LOADER, workload, cores, _WARM_UP, seconds))
    if result.problem:
        return Speed(problem=result.problem)
    per_clip = result.per_clip()
    decode = per_clip.pop("decode")
    others = result.others / (result.seconds * len(cores))
    return Speed(result.rate, decode, sum(per_clip.values()), others)


def _bytes(manifest: Manifest) -> int:
    """Bytes of the videos of the rows that are files."""
    rows = map(manifest.row, range(len(manifest)))
    return sum(open_source(manifest.absolute_path(row), row).encoded_bytes() or 0 for row in rows)
