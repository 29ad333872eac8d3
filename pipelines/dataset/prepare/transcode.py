"""Re-encodes the videos of a manifest for fast decoding: H.264 of a small size with frequent keyframes."""

from __future__ import annotations

import errno
import json
import re
from array import array
from contextlib import closing
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from numpy.typing import NDArray

from pipelines.atomic_file import atomic_file
from pipelines.dataset.manifest import Manifest, ManifestRow
from pipelines.dataset.prepare.findings import Findings
from pipelines.dataset.prepare.listing import Listing
from pipelines.dataset.prepare.text_lines import read_json
from pipelines.dataset.probe import CRASHES, probe_video
from pipelines.dataset.source import open_source
from pipelines.decode.frame_stream import FolderStream, FrameStream
from pipelines.errors import DataError, VideoError
from pipelines.formatting import printable
from pipelines.worker_pool import Progress, ordered_map

SETTINGS = "transcode.json"
"""File with the manifest and the options of the transcoded videos of a folder."""

_MULTIPLE = 16  # pixels: a macroblock, so that the coded frame has no padding
_MAX_RATE = 60  # frames per second
_PER_FOLDER = 1000  # files
_FOLDER_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")

UNUSABLE = "videos that could not be transcoded, left out"


@dataclass(frozen=True, slots=True)
class TranscodeOptions:
    """Settings of the encoder. Raises DataError for a value out of range."""

    short_side: int = 320
    """Pixels; a multiple of 16. Smaller videos are not enlarged."""
    keyframe_interval: int = 12
    """Frames from one keyframe to the next."""
    crf: int = 18
    """x264's constant rate factor: 18 is visually lossless, larger is smaller and worse."""

    def __post_init__(self) -> None:
        if self.short_side % _MULTIPLE or not _MULTIPLE <= self.short_side <= 2160:
            raise DataError(
                f"--short-side {self.short_side}: expected a multiple of {_MULTIPLE}, at most 2160"
            )
        if not 1 <= self.keyframe_interval <= 250:
            raise DataError(f"--keyframe-interval {self.keyframe_interval}: expected 1 to 250 frames")
        if not 0 <= self.crf <= 51:
            raise DataError(f"--crf {self.crf}: expected 0 to 51")

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the encoded picture: multiples of 16 with the nearest aspect ratio."""
        scale = min(1.0, self.short_side / min(height, width))
        rows, columns = (max(1, round(side * scale / _MULTIPLE)) * _MULTIPLE for side in (height, width))
        return rows, columns


def transcode_video(
    stream: FrameStream | FolderStream,
    out: Path,
    options: TranscodeOptions,
    segment: tuple[int, int] | None = None,
) -> None:
    """Write the video or a segment of it at a constant frame rate, upright, in 4:2:0 with 8 bits, BT.601.

    There is no sound. Output frame k shows what the source shows at k / rate seconds. The encoder has one
    thread, so the same source gives the same bytes. The encoded file is decoded as a check before it is
    renamed to `out`.

    Args:
        segment: its first frame in the source, and its number of frames there.

    Raises:
        VideoError: the source cannot be used, or the result does not have the expected frames.
        OSError: the file cannot be written.
    """
    rate = min(stream.rate, Fraction(_MAX_RATE)).limit_denominator(1001)
    first, count = segment or (0, stream.frames)
    if first + count > stream.frames:
        raise VideoError(f"has {stream.frames} frames, but its segment ends with frame {first + count - 1}")
    seconds = np.append(stream.seconds, stream.duration)[first : first + count + 1]
    shown = first + _shown_frames(seconds[:-1] - seconds[0], float(seconds[-1] - seconds[0]), rate)
    with atomic_file(out) as encoded:
        _encode(stream, shown, rate, encoded, options)
        found = probe_video(encoded, deep=True)
        if found.frames != len(shown):
            raise VideoError(f"was encoded as {found.frames} frames instead of {len(shown)}")


def _shown_frames(seconds: NDArray[np.float64], duration: float, rate: Fraction) -> NDArray[np.int64]:
    """For each output frame the index of its source frame: the last one with a time stamp up to its time."""
    count = max(1, round(duration * float(rate)))
    times = np.arange(count) / float(rate)
    return np.maximum(np.searchsorted(seconds, times + 1e-6, side="right") - 1, 0)


def _encode(
    stream: FrameStream | FolderStream,
    shown: NDArray[np.int64],
    rate: Fraction,
    out: Path,
    options: TranscodeOptions,
) -> None:
    repeats = np.bincount(shown, minlength=stream.frames)
    done = 0
    reformatter = VideoReformatter()
    settings = {
        "preset": "medium",
        "crf": str(options.crf),
        # cpu-independent: the same bytes on every CPU; closed groups, since NVDEC through DALI needs them.
        "x264-params": "cpu-independent=1:colormatrix=smpte170m:range=tv:open-gop=0:scenecut=0",
    }
    with av.open(
        str(out), "w", format="mp4", options={"fflags": "+bitexact", "movflags": "+faststart"}
    ) as file:
        video = file.add_stream("libx264", rate=rate, options=settings)
        video.pix_fmt = "yuv420p"
        video.codec_context.thread_count = 1
        video.codec_context.gop_size = options.keyframe_interval
        for number, picture in stream.pictures(repeats > 0):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if number == int(shown[0]):
                video.height, video.width = options.size(*picture.shape[:2])
            small = reformatter.reformat(
                frame,
                video.width,
                video.height,
                "yuv420p",
                dst_colorspace=Colorspace.ITU601,
                interpolation=Interpolation.AREA,
            )
            small.time_base = 1 / rate
            for _ in range(int(repeats[number])):
                small.pts = done
                file.mux(video.encode(small))
                done += 1
        file.mux(video.encode(None))


def transcode_manifest(
    manifest: Manifest,
    folder: Path,
    options: TranscodeOptions,
    *,
    workers: int,
    part: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
) -> Listing:
    """Transcode the videos of a manifest into `folder`, and list the results with their labels and weights.

    Existing results are kept, so the same call continues an interrupted one. Several machines can share the
    work by parts; a call without parts then finds all results and returns the whole listing.

    Args:
        workers: processes; each encodes one video at a time.
        part: (i, n): only rows of index i modulo n.
        progress: called with the number of videos done and of all.

    Raises:
        DataError: the folder holds the sources, or videos of another manifest or other options; it cannot be
            written, or its disk is full; or no video could be transcoded.
    """
    if len(manifest) and manifest.path_at(0).resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{printable(folder)} holds the videos to transcode; give another folder with --to")
    _check_settings(manifest, folder, options)
    rows = range(part[0], len(manifest), part[1])
    findings = Findings()
    paths: list[str] = []
    labels = array("l")
    weights = array("d")

    def job(index: int) -> tuple[Path, ManifestRow, Path] | VideoError:
        try:
            return manifest.path_at(index), manifest.row(index), result_path(manifest, folder, index)
        except VideoError as defect:
            return defect

    with closing(
        ordered_map(
            partial(_transcode_row, options=options),
            map(job, rows),
            total=len(rows),
            workers=workers,
            progress=progress,
            on_crash=lambda _: CRASHES,
            chunk=1,
        )
    ) as problems:
        for index, problem in zip(rows, problems, strict=True):
            if problem:
                findings.add(UNUSABLE, manifest.printable_path(index), problem)
                continue
            row = manifest.row(index)
            paths.append(str(result_path(manifest, folder, index)))
            labels.append(row.label)
            weights.append(row.weight)
    if not paths:
        raise DataError("no video could be transcoded:\n" + "\n".join(findings.table()))
    kept_weights = weights if manifest.weighted else None
    return Listing(paths, labels, manifest.class_names, kept_weights, findings=findings)


def result_path(manifest: Manifest, folder: Path, index: int) -> Path:
    """The file of a row: `videos/000001/000001234_NAME.mp4`, with a thousand files in a folder."""
    stem = _NOT_IN_NAMES.sub("_", printable(Path(manifest.path_at(index).stem)))[:80]
    return folder / "videos" / f"{index // _PER_FOLDER:06d}" / f"{index:09d}_{stem}.mp4"


def _transcode_row(job: tuple[Path, ManifestRow, Path] | VideoError, options: TranscodeOptions) -> str:
    """Transcode the video of one row unless its result exists. Returns the error message, or "" if none.

    Raises DataError where no video can be written to the folder.
    """
    if isinstance(job, VideoError):
        return str(job)
    source, row, out = job
    if out.is_file():
        return ""
    segment = (row.first_frame, row.frames) if row.is_segment else None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        transcode_video(open_source(source, row).stream(), out, options, segment)
    except VideoError as error:
        return str(error)
    except (av.FFmpegError, OSError) as error:
        if error.errno in _FOLDER_ERRORS:
            problem = f"{printable(out.parent)} cannot be written: {error.strerror}"
            raise DataError(f"{problem}; run the same command again once it can be") from error
        return f"cannot be written: {error.strerror or error}"
    return ""


def _check_settings(manifest: Manifest, folder: Path, options: TranscodeOptions) -> None:
    """Record the manifest and the options of the folder, or compare them with those recorded before."""
    settings = {"manifest": manifest.fingerprint, **asdict(options)}
    path = folder / SETTINGS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            before = read_json(path)
        else:
            with atomic_file(path, shared=True) as new:
                new.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
            return
    except OSError as error:
        raise DataError(f"{printable(folder)} cannot be written: {error.strerror}") from error
    if before != settings:
        raise DataError(f"{printable(folder)} {_difference(before, settings)}; give another folder")


def _difference(before: object, settings: dict[str, object]) -> str:
    if not isinstance(before, dict) or before.get("manifest") != settings["manifest"]:
        return "holds the videos of another manifest"
    changed = [name for name in settings if before.get(name) != settings[name]]
    return "holds videos made with " + ", ".join(f"{name} {before.get(name)}" for name in changed)
