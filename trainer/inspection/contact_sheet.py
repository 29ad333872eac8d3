"""Pictures in rows, with words beside each row, as one PNG."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipelines.annotated_video import font_file
from pipelines.atomic_file import atomic_file
from pipelines.formatting import printable
from trainer.errors import RunError

Picture = NDArray[np.uint8]  # H W 3

_SIDE = 128  # pixels of a picture's longer side
_GAP = 4
_WORDS = 300  # pixels, the width of the words beside a row
_FONT_SIZE = 12
_LINE = 15
_PAPER, _INK, _GREY = (255, 255, 255), (20, 20, 20), (110, 110, 110)


@dataclass(frozen=True)
class SheetRow:
    """words: lines beside the pictures, the first in black, the others in grey. pictures: uint8 RGB."""

    words: Sequence[str]
    pictures: Sequence[Picture]


def write_sheet(path: Path, title: str, rows: Sequence[SheetRow], columns: Sequence[str]) -> None:
    """Write rows of pictures with words on the left, a title and a head for each column.

    The file is written whole or not at all. Raises RunError where it cannot be written.
    """
    save_sheet(path, draw_sheet(title, rows, columns))


def draw_sheet(title: str, rows: Sequence[SheetRow], columns: Sequence[str]) -> Image.Image:
    """The sheet as a picture."""
    font = _font()
    words = [[line for text in row.words for line in _wrapped(printable(text), font)] for row in rows]
    tiles = [[_tile(picture) for picture in row.pictures] for row in rows]
    heights = [
        max([_LINE * len(lines), *(tile.height for tile in pictures)])
        for lines, pictures in zip(words, tiles, strict=True)
    ]
    head = _LINE * 2 + _GAP
    width = _WORDS + len(columns) * (_SIDE + _GAP) + 2 * _GAP
    sheet = Image.new("RGB", (width, head + sum(heights) + _GAP * (len(rows) + 1)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP, 1), printable(title), _INK, font)
    for number, text in enumerate(columns):
        pen.text((_left(number), _LINE), printable(text), _GREY, font)
    top = head
    for row, lines, pictures, height in zip(rows, words, tiles, heights, strict=True):
        first = len(_wrapped(printable(row.words[0]), font)) if row.words else 0
        for number, line in enumerate(lines):
            pen.text((_GAP, top + number * _LINE), line, _INK if number < first else _GREY, font)
        for number, tile in enumerate(pictures):
            sheet.paste(tile, (_left(number), top))
        top += height + _GAP
    return sheet


def png_bytes(picture: Image.Image) -> bytes:
    memory = io.BytesIO()
    picture.save(memory, "PNG", optimize=True)
    return memory.getvalue()


def _left(column: int) -> int:
    return _WORDS + _GAP + column * (_SIDE + _GAP)


def _tile(picture: Picture) -> Image.Image:
    """The picture with its longer side at `_SIDE`; small ones keep their pixels square and sharp."""
    image = Image.fromarray(picture)
    scale = _SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS)


def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font_file(), _FONT_SIZE)


def _wrapped(text: str, font: ImageFont.FreeTypeFont) -> list[str]:
    """Lines no wider than the words' column, broken after spaces and slashes, else inside a word."""
    lines = [""]
    for part in re.split(r"(?<=[ /])", text):
        if font.getlength((lines[-1] + part).rstrip()) > _WORDS - _GAP:
            lines.append("")
        for sign in part:
            if font.getlength((lines[-1] + sign).rstrip()) > _WORDS - _GAP:
                lines.append("")
            lines[-1] += sign
    return lines


def save_sheet(path: Path, picture: Image.Image) -> None:
    """Write a PNG, whole or not at all. Raises RunError where it cannot be written."""
    content = png_bytes(picture)
    with written_atomically(path, "--out") as partial:
        partial.write_bytes(content)


@contextmanager
def written_atomically(path: Path, option: str) -> Iterator[Path]:
    """A file to write to, which gets the name `path` at the end, and is removed where that is not reached.

    option: of the command, with which another place is chosen. Raises RunError where it cannot be written.
    """
    try:
        with atomic_file(path, shared=True) as partial:
            yield partial
    except OSError as error:
        raise RunError(
            f"{printable(path)} cannot be written: {error.strerror or error}; choose another with {option}"
        ) from error
