"""A contact sheet: rows of pictures with text beside each row, as one PNG."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pipelines.annotated_video import font_file
from pipelines.atomic_file import atomic_file
from pipelines.formatting import printable
from trainer.errors import RunError

Picture = NDArray[np.uint8]  # H W 3

_SIDE = 128  # pixels of a picture's longer side
_GAP = 4
_TEXT = 300  # pixels, width of the text beside a row
_FONT_SIZE = 12
_LINE = 15
_PAPER, _INK, _GREY = (255, 255, 255), (20, 20, 20), (110, 110, 110)


@dataclass(frozen=True)
class SheetRow:
    """One row of a sheet.

    text: lines beside the pictures, the first in black, the others in grey.
    pictures: uint8 RGB, (H, W, 3).
    """

    text: Sequence[str]
    pictures: Sequence[Picture]


def draw_sheet(title: str, rows: Sequence[SheetRow], columns: Sequence[str]) -> Image.Image:
    """The sheet: rows of pictures with text on the left, a title and a heading for each column."""
    font = ImageFont.truetype(font_file(), _FONT_SIZE)
    texts = [[line for text in row.text for line in _wrapped(printable(text), font)] for row in rows]
    tiles = [[_tile(picture) for picture in row.pictures] for row in rows]
    heights = [
        max([_LINE * len(lines), *(tile.height for tile in pictures)])
        for lines, pictures in zip(texts, tiles, strict=True)
    ]
    head = _LINE * 2 + _GAP
    width = _TEXT + len(columns) * (_SIDE + _GAP) + 2 * _GAP
    sheet = Image.new("RGB", (width, head + sum(heights) + _GAP * (len(rows) + 1)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP, 1), printable(title), _INK, font)
    for number, text in enumerate(columns):
        pen.text((_left(number), _LINE), printable(text), _GREY, font)
    top = head
    for row, lines, pictures, height in zip(rows, texts, tiles, heights, strict=True):
        first = len(_wrapped(printable(row.text[0]), font)) if row.text else 0
        for number, line in enumerate(lines):
            pen.text((_GAP, top + number * _LINE), line, _INK if number < first else _GREY, font)
        for number, tile in enumerate(pictures):
            sheet.paste(tile, (_left(number), top))
        top += height + _GAP
    return sheet


def denormalise(frames: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pixels of a normalised clip. frames: (3, T, H, W) → uint8 RGB (T, H, W, 3) on the CPU."""
    mean_of, std_of = (torch.tensor(values, device=frames.device) for values in (mean, std))
    levels = frames.permute(1, 2, 3, 0) * std_of + mean_of
    return (levels * 255).round().clamp(0, 255).to(torch.uint8).cpu()


def png_bytes(picture: Image.Image) -> bytes:
    memory = io.BytesIO()
    picture.save(memory, "PNG", optimize=True)
    return memory.getvalue()


def _left(column: int) -> int:
    return _TEXT + _GAP + column * (_SIDE + _GAP)


def _tile(picture: Picture) -> Image.Image:
    """The picture scaled to a longer side of `_SIDE`; small pictures keep sharp pixels."""
    image = Image.fromarray(picture)
    scale = _SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS)


def _wrapped(text: str, font: ImageFont.FreeTypeFont) -> list[str]:
    """Lines that fit the text column, broken after spaces and slashes, else inside a word."""
    lines = [""]
    for part in re.split(r"(?<=[ /])", text):
        if font.getlength((lines[-1] + part).rstrip()) > _TEXT - _GAP:
            lines.append("")
        for sign in part:
            if font.getlength((lines[-1] + sign).rstrip()) > _TEXT - _GAP:
                lines.append("")
            lines[-1] += sign
    return lines


def save_sheet(path: Path, picture: Image.Image, *, option: str | None = "--out") -> None:
    """Write a PNG atomically. Raises RunError if it cannot be written. option: see `written_atomically`."""
    content = png_bytes(picture)
    with written_atomically(path, option) as partial:
        partial.write_bytes(content)


@contextmanager
def written_atomically(path: Path, option: str | None) -> Iterator[Path]:
    """Yields a temporary file, which is renamed to `path` at the end and deleted after an error.

    option: the command's option for the path, named in the message; None if there is none. Raises RunError if
    the file cannot be written.
    """
    try:
        with atomic_file(path, shared=True) as partial:
            yield partial
    except OSError as error:
        raise RunError(
            f"{printable(path)} cannot be written: {error.strerror or error}"
            + (f"; choose another with {option}" if option else "")
        ) from error
