"""Renders videos to decode: a moving detailed picture with grain, in several sizes and encodings."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from pipelines.dataset.prepare.build import build_manifest
from pipelines.dataset.prepare.listing import Listing
from pipelines.worker_pool import ordered_map, usable_cores

FPS = 25
NUMBER_BITS = 12
"""The frame's number is drawn into the frame as so many black and white squares."""
BT601, BT709 = 5, 1
"""FFmpeg's numbers of the colour matrices (AVColorSpace)."""


@dataclass(frozen=True)
class VideoEncoding:
    """How videos are encoded."""

    width: int
    height: int
    gop: int
    """Frames between keyframes."""
    frames: int = 300
    encoder: str = "libx264"
    parameters: str = ""
    """Of the encoder's own library (x264-params, x265-params)."""
    matrix: int = BT601
    full_range: bool = False

    @property
    def name(self) -> str:
        codec = {"libx264": "H.264", "libx265": "HEVC", "libvpx-vp9": "VP9"}[self.encoder]
        colour = f"{', BT.709' * (self.matrix == BT709)}{', full range' * self.full_range}"
        b_frames = ", B-frames" * ("bframes" in self.parameters)
        return f"{codec} {self.width}x{self.height}, keyframe every {self.gop}{colour}{b_frames}"


def make_videos(wanted: Sequence[tuple[Path, VideoEncoding]]) -> None:
    """Encode the videos that do not exist yet, in as many processes as there are cores.

    The number in a file's name is the seed of its video.
    """
    missing = [job for job in wanted if not job[0].exists()]
    for path in ordered_map(_make, missing, total=len(missing), workers=usable_cores(), chunk=1):
        print(f"encoded {path}", flush=True)


def numbered(folder: Path, count: int) -> list[Path]:
    """The paths of `count` videos in a folder."""
    return [folder / f"{number:03d}.mp4" for number in range(count)]


def make_manifest(folder: Path, paths: Sequence[Path]) -> Path:
    """A manifest of these videos, of two classes."""
    manifest = folder / "videos.arrow"
    listing = Listing([*map(str, paths)], [number % 2 for number in range(len(paths))], ("even", "odd"))
    build_manifest(manifest, listing, workers=1)
    return manifest


def read_number(frame: np.ndarray) -> int:
    """The number drawn into a frame H W 3."""
    height, width, _ = frame.shape
    side = _square(width)
    row = frame[height - side : height, : NUMBER_BITS * side].astype(float).mean(axis=2)
    squares = row.reshape(side, NUMBER_BITS, side)[side // 4 : -(side // 4), :, side // 4 : -(side // 4)]
    return sum(int(value > 128) << bit for bit, value in enumerate(squares.mean(axis=(0, 2))))


def _make(job: tuple[Path, VideoEncoding]) -> Path:
    path, coding = job
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new.mp4")
    rng = np.random.default_rng(int(path.stem))
    picture = _detailed(rng, coding.height + 128, coding.width + 256)
    grain = rng.normal(0, 3, (8, coding.height, coding.width, 1)).astype(np.float32)
    range_of = (
        av.video.reformatter.ColorRange.JPEG if coding.full_range else av.video.reformatter.ColorRange.MPEG
    )
    fast = {"deadline": "realtime", "cpu-used": "8"}
    options = fast if coding.encoder == "libvpx-vp9" else {"preset": "veryfast"}
    if coding.parameters:
        options[f"{coding.encoder.removeprefix('lib')}-params"] = coding.parameters
    with av.open(str(temporary), "w") as container:
        stream = container.add_stream(coding.encoder, rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = coding.width, coding.height, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.gop_size = coding.gop
        stream.codec_context.colorspace = coding.matrix
        stream.codec_context.color_range = range_of
        for number in range(coding.frames):
            top, left = abs(number % 256 - 128), abs(3 * number % 512 - 256)
            window = picture[top : top + coding.height, left : left + coding.width] + grain[number % 8]
            pixels = _numbered(window.clip(0, 255).astype(np.uint8), number)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=coding.matrix, dst_color_range=range_of)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    temporary.rename(path)
    return path


def _detailed(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Random detail of every size on brown, stronger where it is coarser: H W 3 float32."""
    picture = np.full((height, width, 3), (190, 110, 60), np.float32)
    for scale in (4, 8, 16, 32, 64):
        coarse = rng.uniform(-1, 1, (-(-height // scale), -(-width // scale), 3)).astype(np.float32)
        fine = coarse.repeat(scale, axis=0).repeat(scale, axis=1)[:height, :width]
        picture += 14 * scale**0.3 * fine
    return picture


def _square(width: int) -> int:
    """Side of one of the number's squares in pixels: large enough to survive 4:2:0 and encoding."""
    return width // NUMBER_BITS // 2


def _numbered(pixels: np.ndarray, number: int) -> np.ndarray:
    height, width, _ = pixels.shape
    side = _square(width)
    for bit in range(NUMBER_BITS):
        value = 235 if number >> bit & 1 else 20
        pixels[height - side : height, bit * side : (bit + 1) * side] = value
    return pixels
