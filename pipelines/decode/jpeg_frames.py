"""Folders of JPEG frames: the frames by the numbers in their names, decoded as libjpeg does.

FFmpeg's decoder is not used here: it does not report a picture whose last bytes are missing, and it scales
the colour channels otherwise than libjpeg, with which such data sets are usually read.
"""

import io
import itertools
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipelines.decode.pyav import check_frames, check_picture_size
from pipelines.decode.scaling import scaled_size
from pipelines.decode.video_file import VideoFile
from pipelines.errors import VideoError

_NAME = re.compile(r"(.*?)([0-9]{1,18})\.jpe?g", re.IGNORECASE)
_FIRST_NUMBERS = (0, 1)

# What Pillow raises for a damaged picture.
_DAMAGED = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


def list_frames(folder: Path) -> list[str]:
    """The names of the frames in a folder, ordered by number: `00001.jpg`, or `img_00001.jpg`.

    Hidden files and files that are no JPEG are ignored.

    Raises:
        VideoError: the folder cannot be read or has no frame; a number is missing or occurs twice; the names
            have two prefixes; the numbers do not begin at 0 or 1.
    """
    try:
        found = [name for name in os.listdir(folder) if _is_jpeg(name)]
    except OSError as error:
        raise VideoError(f"cannot be read: {error.strerror}") from error
    if not found:
        raise VideoError("holds no JPEG frame, such as 00001.jpg")
    numbered: dict[int, str] = {}
    prefix = None
    for name in sorted(found):
        match = _NAME.fullmatch(name)
        if match is None:
            raise VideoError(f"holds {name}, whose name does not end with a frame number, such as 00001.jpg")
        if prefix is not None and match[1] != prefix:
            raise VideoError(f"holds frames of two names: {match[0]} and {next(iter(numbered.values()))}")
        prefix, number = match[1], int(match[2])
        if number in numbered:
            raise VideoError(f"holds frame {number} twice: {numbered[number]} and {name}")
        numbered[number] = name
    order = sorted(numbered)
    if order[0] not in _FIRST_NUMBERS:
        raise VideoError(f"begins with {numbered[order[0]]}: the frames before it are missing")
    for before, after in itertools.pairwise(order):
        if after != before + 1:
            raise VideoError(f"lacks frame {before + 1}: {numbered[before]} is followed by {numbered[after]}")
    return [numbered[number] for number in order]


def _is_jpeg(name: str) -> bool:
    return name.lower().endswith((".jpg", ".jpeg")) and not name.startswith(".")


def read_picture(path: Path) -> bytes:
    """The bytes of a file. Raises VideoError."""
    with VideoFile(path) as file:
        return file.read_range(0, file.size)


def decode_jpeg(data: bytes) -> NDArray[np.uint8]:
    """A JPEG as RGB, upright by its Exif orientation: (H, W, 3).

    Raises:
        VideoError: it is no JPEG, truncated, or otherwise damaged as far as libjpeg detects it.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as picture:
            upright = ImageOps.exif_transpose(picture) if "exif" in picture.info else picture
            return np.asarray(upright.convert("RGB"))
    except Image.UnidentifiedImageError:
        raise VideoError("it is no JPEG") from None
    except _DAMAGED as error:
        raise VideoError(str(error)) from error


@dataclass(frozen=True)
class JpegFrames:
    """Some frames of a folder, as read from disk."""

    names: tuple[str, ...]
    """Of all frames in the folder, by number from 0."""
    files: dict[int, bytes]
    """Those that were read, by number."""

    @classmethod
    def read(cls, folder: Path, indices: NDArray[np.integer], frames: int) -> "JpegFrames":
        """Read the frames at `indices`.

        frames: how many the folder must have.

        Raises VideoError as `list_frames`, and if there are fewer or more frames, or one cannot be read.
        """
        names = list_frames(folder)
        if len(names) != frames:
            raise VideoError(
                f"has {len(names)} frames, but the manifest has {frames}: the folder was changed; make a new "
                "manifest"
            )
        check_frames(indices, len(names))
        wanted = sorted(set(indices.tolist()))
        return cls(tuple(names), {number: _read_frame(folder, names, number) for number in wanted})

    def decode(
        self,
        indices: NDArray[np.integer],
        roi: tuple[int, int, int, int] | None = None,
        *,
        size: tuple[int, int],
        max_short_side: int | None = None,
    ) -> NDArray[np.uint8]:
        """As `pyav.decode_frames`; each frame is decoded once."""
        scaled = scaled_size(*size, max_short_side)
        top, left, bottom, right = roi or (0, 0, *scaled)
        pixels = np.empty((len(indices), bottom - top, right - left, 3), np.uint8)
        for number in sorted(self.files):
            picture = self.picture(number)
            check_picture_size(picture.shape[:2], size)
            if scaled != size:
                whole = Image.fromarray(picture)
                picture = np.asarray(whole.resize((scaled[1], scaled[0]), Image.Resampling.BOX))
            pixels[indices == number] = picture[top:bottom, left:right]
        return pixels

    def picture(self, number: int) -> NDArray[np.uint8]:
        """One frame as RGB, (H, W, 3). Raises VideoError if it is damaged."""
        try:
            return decode_jpeg(self.files[number])
        except VideoError as defect:
            where = f"frame {number} of {len(self.names)} ({self.names[number]})"
            raise VideoError(f"is damaged in {where}: {defect}") from defect


def frames_shape(folder: Path) -> tuple[int, int, int]:
    """Number, height and width of a folder's frames. Decodes all of them.

    Raises:
        VideoError: as `list_frames`, or a frame is damaged or has another size than those before it.
    """
    names = list_frames(folder)
    shape: tuple[int, ...] = ()
    for number, name in enumerate(names):
        now = decode_frame(folder, names, number).shape[:2]
        if shape and now != shape:
            raise VideoError(
                f"changes from frames of {shape[1]}x{shape[0]} to {now[1]}x{now[0]} at frame {number} "
                f"({name})"
            )
        shape = now
    return len(names), shape[0], shape[1]


def decode_frame(folder: Path, names: Sequence[str], number: int) -> NDArray[np.uint8]:
    """One frame as RGB, (H, W, 3).

    names: as `list_frames` returns them.

    Raises VideoError if it cannot be read or is damaged.
    """
    return JpegFrames(tuple(names), {number: _read_frame(folder, names, number)}).picture(number)


def _read_frame(folder: Path, names: Sequence[str], number: int) -> bytes:
    try:
        return read_picture(folder / names[number])
    except VideoError as defect:
        raise VideoError(f"has a frame {number} ({names[number]}) that {defect}") from defect
