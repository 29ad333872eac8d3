"""The embedded data set: rendered videos of moving shapes in classes that differ only in time.

The eight classes are four pairs, each the other played backwards. Clips come in twins: the frames of the
pair's first class, and the same frames in reverse order as the clip of the second. A model that ignores
order cannot distinguish the classes of a pair, so its accuracy is at most 50 %, whichever features it uses:
position, speed, easing, background.

All motion is inside the central square of the frame, so a central crop contains all of it. Mirroring a clip
changes its class, so train without flips.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

import av
import numpy as np

from pipelines.atomic_file import STALE, atomic_file
from pipelines.dataset.manifest import ManifestRow, write_manifest
from pipelines.errors import DataError
from pipelines.synthetic.drawing import ShapePath, draw_clip
from pipelines.synthetic.video_writer import H264, MJPEG, VP9, VideoFormat, encode_video
from pipelines.worker_pool import Progress, ordered_map

CLASS_NAMES = (
    "move_left",
    "move_right",
    "move_up",
    "move_down",
    "turn_clockwise",
    "turn_counterclockwise",
    "grow",
    "shrink",
)

# Different random streams: no clip of one split is a clip of the other.
_SPLITS = {"train": 0, "val": 1}

_FORMATS = (VP9, H264, MJPEG)
_RATES = (Fraction(8), Fraction(12), Fraction(25, 2), Fraction(24000, 1001), Fraction(30))
# Short enough that a clip has several keyframes, long enough that most frames depend on others.
_KEYFRAME_INTERVAL = 12
_LOG = "rendering.log"
# Maximum distance of a shape from the frame's centre, in units of the shorter side; 0.5 is the edge.
_REACH = 0.47


@dataclass(frozen=True, slots=True)
class MotionSettings:
    """Settings of all clips of a data set; raises DataError for values out of range."""

    seed: int
    """Random seed, not negative."""
    size: int = 72
    """Pixels on the shorter side, even."""
    frames: tuple[int, int] = (16, 24)
    """Range of the number of frames of a clip."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise DataError(f"seed {self.seed}: it must not be negative")
        if self.size < 32 or self.size % 2:
            raise DataError(f"clips of {self.size} pixels: the size must be even, and at least 32")
        if not 2 <= self.frames[0] <= self.frames[1]:
            raise DataError(f"clips of {self.frames[0]} to {self.frames[1]} frames: motion needs at least 2")


@dataclass(frozen=True, slots=True)
class MotionClip:
    """A clip before encoding."""

    label: int
    """Index in `CLASS_NAMES`."""
    frames: np.ndarray
    """T H W 3, uint8."""
    fps: Fraction
    """Frames per second."""


def draw_motion_clip(settings: MotionSettings, split: str, index: int) -> MotionClip:
    """Clip `index` of a split ("train" or "val"), a function of its arguments alone.

    Clips 2k and 2k + 1 are twins: the second has the frames of the first in reverse order.
    """
    twin, reverse = divmod(index, 2)
    motion = twin % len(_MOTIONS)
    rng = np.random.default_rng([settings.seed, _SPLITS[split], twin])
    fps = _RATES[rng.integers(len(_RATES))]
    height, width = _frame_size(rng, settings.size)
    frames = int(rng.integers(settings.frames[0], settings.frames[1] + 1))
    path = _MOTIONS[motion](rng, _progress(rng, frames))
    pictures = draw_clip(rng, path, height, width)
    return MotionClip(2 * motion + reverse, pictures[::-1] if reverse else pictures, fps)


def render(
    root: Path,
    *,
    train_clips: int,
    val_clips: int,
    seed: int,
    size: int = 72,
    frames: tuple[int, int] = (16, 24),
    workers: int = 1,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> tuple[Path, Path]:
    """Write videos under `root/{train,val}/CLASS/` and the manifests `root/train.arrow` and `root/val.arrow`.

    The bytes of a file depend on seed, size, frames and its index, not on the number of workers. A file
    appears under its name when it is complete, and a manifest after its last video. The same call continues
    an interrupted one: `root/rendering.log` lists the complete videos until both manifests are written. A
    video stays if its content, the settings and the renderer are those of its line.

    Args:
        size: pixels on the shorter side of a clip, even.
        frames: range of the number of frames of a clip.
        workers: processes; with more than one, the caller's main module must be importable.
        progress: called after each clip with the numbers of finished clips and of all clips.
        note: called with a sentence about the videos of an interrupted rendering, if there are any.

    Returns:
        The paths of the training and the validation manifest.

    Raises:
        DataError: a value is out of range.
    """
    if train_clips < 1 or val_clips < 1:
        raise DataError(f"{train_clips} training and {val_clips} validation clips: each needs at least one")
    settings = MotionSettings(seed, size, frames)
    manifests = root / "train.arrow", root / "val.arrow"
    for manifest in manifests:
        manifest.unlink(missing_ok=True)
    for split in _SPLITS:
        for name in CLASS_NAMES:
            (root / split / name).mkdir(parents=True, exist_ok=True)

    jobs = [("train", i) for i in range(train_clips)] + [("val", i) for i in range(val_clips)]
    key = _renderer_key(settings)
    logged = _read_log(root / _LOG, key)
    lines = [logged.get(_video_name(*job)) for job in jobs]
    written = sum(line is not None for line in lines)
    if written and note is not None:
        note(
            f"{written:,} of {len(jobs):,} videos are of an interrupted rendering; those that are whole stay"
        )
    with (root / _LOG).open("a", encoding="utf-8") as log:
        log.write("\n")  # the last line may be cut
    work = partial(_write_clip, root, settings, key)
    numbered = [(*job, line) for job, line in zip(jobs, lines, strict=True)]
    with closing(
        ordered_map(work, numbered, total=len(numbered), workers=workers, progress=progress)
    ) as rows:
        write_manifest(manifests[0], islice(rows, train_clips), CLASS_NAMES)
        write_manifest(manifests[1], rows, CLASS_NAMES)
    (root / _LOG).unlink(missing_ok=True)  # another process may render the same
    _remove_stale(root)
    return manifests


def _remove_stale(root: Path) -> None:
    """Remove the partial videos of killed processes; see `partial_path` for their names."""
    for split, name, video_format in product(_SPLITS, CLASS_NAMES, _FORMATS):
        for left in (root / split / name).glob(f".[0-9]*{video_format.extension}.[0-9]*.partial"):
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > STALE:
                    left.unlink()


def _video_format(index: int) -> VideoFormat:
    # The format changes after every eight classes, so it does not depend on the class.
    return _FORMATS[index // len(CLASS_NAMES) % len(_FORMATS)]


def _video_name(split: str, index: int) -> str:
    """The path of a video below the root; the label of a clip is its index modulo 8."""
    return f"{split}/{CLASS_NAMES[index % len(CLASS_NAMES)]}/{index:06d}{_video_format(index).extension}"


def _write_clip(
    root: Path, settings: MotionSettings, key: str, job: tuple[str, int, str | None]
) -> ManifestRow:
    """Write a clip's video, unless the one of its line in the log is whole."""
    split, index, line = job
    kept = None if line is None else _row_of_whole_video(root, key, line)
    if kept is not None:
        return kept
    clip = draw_motion_clip(settings, split, index)
    video_format = _video_format(index)
    frames, height, width, _ = clip.frames.shape
    row = ManifestRow(
        path=_video_name(split, index),
        offset=0,
        length=0,
        label=clip.label,
        frames=frames,
        fps=float(clip.fps),
        width=width,
        height=height,
        codec=video_format.codec,
    )
    with atomic_file(root / row.path, shared=True) as partial:
        encode_video(partial, clip.frames, video_format, clip.fps, _KEYFRAME_INTERVAL)
        line = _log_line(key, row, partial.read_bytes())
    with (root / _LOG).open("a", encoding="utf-8") as log:
        log.write(line)
    return row


def _renderer_key(settings: MotionSettings) -> str:
    """Identifies all that a video's bytes depend on apart from its index: settings, source and libraries."""
    versions = np.__version__, av.__version__, sorted(av.library_versions.items())
    digest = hashlib.sha256(repr((settings, versions)).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _log_line(key: str, row: ManifestRow, video: bytes) -> str:
    """The line of a complete video: the renderer, a hash of row and content, and the row as JSON."""
    text = json.dumps(asdict(row))
    return f"{key} {hashlib.sha256(text.encode() + video).hexdigest()} {text}\n"


def _read_log(log: Path, key: str) -> dict[str, str]:
    """The lines of the videos that this renderer has written, by the path of each video."""
    if not log.exists():
        return {}
    found = {}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        with suppress(IndexError, KeyError, TypeError, ValueError):  # a damaged line
            if line.startswith(key):
                found[str(_stored_row(line)["path"])] = line
    return found


def _row_of_whole_video(root: Path, key: str, line: str) -> ManifestRow | None:
    """The row of a video; None where the line or the video is damaged or the video is gone."""
    try:
        row = ManifestRow(**_stored_row(line))
        return row if line == _log_line(key, row, (root / row.path).read_bytes()) else None
    except (OSError, TypeError, ValueError):
        return None


def _stored_row(line: str) -> dict[str, Any]:
    """Raises IndexError or ValueError for a damaged line."""
    return dict(json.loads(line.split(" ", 2)[2]))


def _frame_size(rng: np.random.Generator, size: int) -> tuple[int, int]:
    """Height and width: the shorter side is `size`, the ratio 1:1, 4:3, 3:4 or 3:2."""
    third, half = 2 * round(size * 2 / 3), 2 * round(size * 3 / 4)
    return ((size, size), (size, third), (third, size), (size, half))[rng.integers(4)]


def _progress(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Progress of the motion in each frame, 0 to 1: linear, smooth at both ends, or faster at one end."""
    time = np.linspace(0, 1, frames)
    easings = (time, time * time * (3 - 2 * time), time**1.4, 1 - (1 - time) ** 1.4)
    return easings[rng.integers(len(easings))]


def _sway(rng: np.random.Generator, amount: float, progress: np.ndarray) -> np.ndarray:
    """A small linear change by at most `amount` in either direction, independent of the class."""
    return rng.uniform(-amount, amount) * (progress - 0.5)


def _move(rng: np.random.Generator, progress: np.ndarray) -> tuple[np.ndarray, ...]:
    """Along, across, radius and angle of a shape that moves from the positive to the negative side."""
    radius = rng.uniform(0.14, 0.2)
    distance = rng.uniform(0.42, 2 * (_REACH - radius))
    middle = rng.uniform(-1, 1) * (_REACH - radius - distance / 2)
    along = middle + distance * (0.5 - progress)
    across = rng.uniform(-1, 1) * (_REACH - radius - 0.03) + _sway(rng, 0.06, progress)
    angle = rng.uniform(0, 2 * np.pi) + _sway(rng, 0.3, progress)
    return along, across, np.full_like(along, radius), angle


def _move_left(rng: np.random.Generator, progress: np.ndarray) -> ShapePath:
    along, across, radius, angle = _move(rng, progress)
    return ShapePath(along, across, radius, angle)


def _move_up(rng: np.random.Generator, progress: np.ndarray) -> ShapePath:
    along, across, radius, angle = _move(rng, progress)
    return ShapePath(across, along, radius, angle)


def _turn_clockwise(rng: np.random.Generator, progress: np.ndarray) -> ShapePath:
    radius = rng.uniform(0.24, 0.34)
    # Between two of eight sampled frames it rotates by at most 50 degrees, where the easing is steepest:
    # far below the 180 degrees at which both directions look the same.
    angle = rng.uniform(0, 2 * np.pi) + np.deg2rad(rng.uniform(110, 220)) * progress
    x, y = (rng.uniform(-1, 1) * (_REACH - radius - 0.03) + _sway(rng, 0.06, progress) for _ in range(2))
    return ShapePath(x, y, np.full_like(x, radius), angle)


def _grow(rng: np.random.Generator, progress: np.ndarray) -> ShapePath:
    smallest = rng.uniform(0.09, 0.14)
    largest = smallest * rng.uniform(2.2, 3.0)
    radius = smallest * (largest / smallest) ** progress
    angle = rng.uniform(0, 2 * np.pi) + _sway(rng, 0.3, progress)
    x, y = (rng.uniform(-1, 1) * (_REACH - largest) + _sway(rng, 0.04, progress) for _ in range(2))
    return ShapePath(x, y, radius, angle)


# The motion of the first class of each pair.
_MOTIONS = (_move_left, _move_up, _turn_clockwise, _grow)
