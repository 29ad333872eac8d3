"""A video with lines of text and bars over its frames, written as H.264 in MP4 while it is decoded."""

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

MAX_SHORT_SIDE = 1080  # pixels; a larger video is scaled down to it
TICK = Fraction(1, 90_000)  # seconds: MPEG's clock, of which usual frame rates are whole multiples
MIN_SIDE = 16  # pixels, below which x264 encodes nothing
UNKNOWN = "\u25a1"  # a box, in place of what the font lacks

Lines = tuple[tuple[str, float], ...]
"""Text with a share (0..1), which is shown as a bar and in per cent."""


def annotate_video(
    stream: FrameStream,
    out: Path,
    lines_at: Callable[[float], Lines],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the video with lines over it. Memory does not grow with its length; sound is left out.

    lines_at: what is shown at so many seconds. progress: told the frames that are done, and of how many.

    Frames keep their times and their size, but that sides are made even, as 4:2:0 colour needs, and a short
    side above 1080 pixels is scaled down to that. The file appears under its name when it is complete.

    Raises VideoError where the video is found damaged, and DataError where the file cannot be written.
    """
    try:
        with (
            atomic_file(out, shared=True) as partial,
            av.open(str(partial), "w", format="mp4") as container,
        ):
            video = container.add_stream("libx264", options={"preset": "veryfast", "crf": "20"})
            video.pix_fmt = "yuv420p"
            video.time_base = video.codec_context.time_base = TICK
            begun = False
            time = -1
            for number, picture in stream.pictures():
                picture = _fitted(picture)
                if not begun:
                    video.height, video.width = picture.shape[:2]
                    video.codec_context.framerate = stream.rate
                    begun = True
                draw(picture, lines_at(float(stream.seconds[number])))
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                # Frames closer than a tick: MP4 takes no two of the same time.
                time = max(round(float(stream.seconds[number]) / float(TICK)), time + 1)
                frame.time_base, frame.pts = TICK, time
                container.mux(video.encode(frame))
                progress(number + 1, stream.frames)
            container.mux(video.encode(None))
    except (OSError, av.FFmpegError) as error:
        raise DataError(f"{printable(out)} cannot be written: {error.strerror or error}") from error


def draw(picture: NDArray[np.uint8], lines: Lines) -> None:
    """Put the lines over the picture, (H, W, 3) RGB, at its lower left, in place."""
    height, width = picture.shape[:2]
    panel = _panel(lines, height, width)
    rows, columns = panel.shape[:2]
    place = picture[height - rows :, :columns]
    opacity = panel[..., 3:].astype(np.uint16)
    mixed = panel[..., :3] * opacity + place * (255 - opacity)
    place[:] = (mixed // 255).astype(np.uint8)


def printable_text(text: str) -> str:
    """The text on one line, with a box in place of each character that the font lacks."""
    return "".join(c if ord(c) in _glyphs() and c.isprintable() else UNKNOWN for c in text)


def _fitted(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture of its own, of even sides, the short one not above `MAX_SHORT_SIDE`."""
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
    """The lines on a dark ground, (h, w, 4) RGBA, no larger than the picture."""
    size = max(8, min(height // 28, width // 24))
    font = ImageFont.truetype(font_file(), size)
    row, margin = round(size * 1.5), size // 2
    fitting = max(1, min(len(lines), (height - 2 * margin) // row))
    panel_width = min(width, max(24 * size, width // 3))
    panel_height = min(height, fitting * row + 2 * margin)
    image = Image.new("RGBA", (panel_width, panel_height), (0, 0, 0, 150))
    brush = ImageDraw.Draw(image)
    share_width = round(font.getlength("100 %"))
    room = panel_width - 3 * margin - share_width
    for place, (text, share) in enumerate(lines[:fitting]):
        top = margin + place * row
        filled = margin + round((panel_width - 2 * margin) * min(max(share, 0.0), 1.0))
        brush.rectangle((margin, top, panel_width - margin, top + row - 3), fill=(60, 60, 60, 190))
        if filled > margin:
            brush.rectangle((margin, top, filled, top + row - 3), fill=(42, 120, 190, 255))
        middle = top + (row - 3) / 2
        brush.text((1.6 * margin, middle), _cut(printable_text(text), font, room), "white", font, anchor="lm")
        percent = f"{100 * share:.0f} %"
        brush.text((panel_width - 1.4 * margin, middle), percent, "white", font, anchor="rm")
    return np.array(image)


def _cut(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    """As much of the text as fits, with an ellipsis where that is not all."""
    text = text[:200]
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(f"{text}\u2026") > room:
        text = text[:-1]
    return f"{text}\u2026"


@lru_cache(maxsize=1)
def font_file() -> str:
    """DejaVu Sans, which matplotlib brings along: Latin, Greek, Cyrillic, Arabic and more, but no CJK."""
    from matplotlib import get_data_path

    return str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


@lru_cache(maxsize=1)
def _glyphs() -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(font_file()).get_charmap())
