"""Writes a video with text and bars over its frames, as H.264 in MP4."""

from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipelines.atomic_file import atomic_file
from pipelines.decode.frame_stream import FrameStream
from pipelines.errors import DataError
from pipelines.formatting import printable
from pipelines.worker_pool import Progress

MAX_SHORT_SIDE = 1080  # pixels; a larger video is scaled down to it
TICK = Fraction(1, 90_000)  # seconds: MPEG's clock; frames of usual rates last whole multiples of it
MIN_SIDE = 16  # pixels; x264 encodes nothing smaller
UNKNOWN = "\u25a1"  # a box, for characters that the font lacks

Lines = tuple[tuple[str, float], ...]
"""Texts with a share (0 to 1), drawn as a bar and in per cent."""


def annotate_video(
    stream: FrameStream,
    out: Path,
    lines_at: Callable[[float], Lines],
    progress: Progress = lambda done, total: None,
) -> None:
    """Write the video with lines over its frames, without sound. Memory use does not depend on its length.

    Frames keep their times. They keep their size, except that sides become even, as 4:2:0 colour requires,
    and that a short side above `MAX_SHORT_SIDE` is scaled down to it. The file appears under its name when
    it is complete.

    Args:
        stream: the video.
        out: the file to write.
        lines_at: the lines at a time in seconds.
        progress: called with the numbers of finished frames and of all frames.

    Raises:
        VideoError: the video is damaged.
        DataError: the file cannot be written.
    """
    try:
        with (
            atomic_file(out, shared=True) as partial,
            av.open(str(partial), "w", format="mp4") as container,
        ):
            video = container.add_stream("libx264", options={"preset": "veryfast", "crf": "20"})
            video.pix_fmt = "yuv420p"
            video.time_base = video.codec_context.time_base = TICK
            time = -1
            for number, picture in stream.pictures():
                picture = _resized(picture)
                if time < 0:
                    video.height, video.width = picture.shape[:2]
                    video.codec_context.framerate = stream.rate
                draw_lines(picture, lines_at(float(stream.seconds[number])))
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                # MP4 allows no equal times, so frames closer than a tick move to the next one.
                time = max(round(float(stream.seconds[number]) / float(TICK)), time + 1)
                frame.time_base, frame.pts = TICK, time
                container.mux(video.encode(frame))
                progress(number + 1, stream.frames)
            container.mux(video.encode(None))
    except (OSError, av.FFmpegError) as error:
        raise DataError(f"{printable(out)} cannot be written: {error.strerror or error}") from error


def draw_lines(picture: NDArray[np.uint8], lines: Lines) -> None:
    """Draw the lines over the lower left of the picture, (H, W, 3) RGB, in place."""
    height, width = picture.shape[:2]
    panel = _panel(lines, height, width)
    rows, columns = panel.shape[:2]
    corner = picture[height - rows :, :columns]
    opacity = panel[..., 3:].astype(np.uint16)
    mixed = panel[..., :3] * opacity + corner * (255 - opacity)
    corner[:] = (mixed // 255).astype(np.uint8)


def printable_text(text: str) -> str:
    """The text with a box for each character that is not printable or that the font lacks."""
    return "".join(c if ord(c) in _glyphs() and c.isprintable() else UNKNOWN for c in text)


def _resized(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A copy with even sides, the short one at most `MAX_SHORT_SIDE`."""
    height, width = picture.shape[:2]
    scale = MAX_SHORT_SIDE / min(height, width)
    if scale < 1:
        size = round(width * scale), round(height * scale)
        picture = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR))
        height, width = picture.shape[:2]
    rows, columns = max(MIN_SIDE, height + height % 2), max(MIN_SIDE, width + width % 2)
    padding = ((0, rows - height), (0, columns - width), (0, 0))
    return np.pad(picture, padding, mode="edge") if (rows, columns) != (height, width) else picture.copy()


@lru_cache(maxsize=64)
def _panel(lines: Lines, height: int, width: int) -> NDArray[np.uint8]:
    """The lines on a dark background, (h, w, 4) RGBA, at most as large as the picture."""
    size = max(8, min(height // 28, width // 24))
    font = ImageFont.truetype(font_file(), size)
    row, margin = round(size * 1.5), size // 2
    fitting = max(1, min(len(lines), (height - 2 * margin) // row))
    panel_width = min(width, max(24 * size, width // 3))
    panel_height = min(height, fitting * row + 2 * margin)
    image = Image.new("RGBA", (panel_width, panel_height), (0, 0, 0, 150))
    brush = ImageDraw.Draw(image)
    share_width = round(font.getlength("100 %"))
    text_width = panel_width - 3 * margin - share_width
    for number, (text, share) in enumerate(lines[:fitting]):
        top = margin + number * row
        filled = margin + round((panel_width - 2 * margin) * min(max(share, 0.0), 1.0))
        brush.rectangle((margin, top, panel_width - margin, top + row - 3), fill=(60, 60, 60, 190))
        if filled > margin:
            brush.rectangle((margin, top, filled, top + row - 3), fill=(42, 120, 190, 255))
        middle = top + (row - 3) / 2
        brush.text(
            (1.6 * margin, middle),
            _truncated(printable_text(text), font, text_width),
            "white",
            font,
            anchor="lm",
        )
        percent = f"{100 * share:.0f} %"
        brush.text((panel_width - 1.4 * margin, middle), percent, "white", font, anchor="rm")
    return np.array(image)


def _truncated(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, or as much of it as fits with an ellipsis."""
    text = text[:200]
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}\u2026") > width:
        text = text[:-1]
    return f"{text}\u2026"


@lru_cache(maxsize=1)
def font_file() -> str:
    """DejaVu Sans, which matplotlib includes: Latin, Greek, Cyrillic, Arabic and more, but no CJK."""
    from matplotlib import get_data_path

    return str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


@lru_cache(maxsize=1)
def _glyphs() -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(font_file()).get_charmap())
