"""How a coded picture is turned and mirrored to be shown: the display matrix that phones write.

A quarter turn swaps rows and columns first, then reverses one of them. Turns by other angles are not applied,
as they would leave corners empty.
"""

import math
from dataclasses import dataclass

import av
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Orientation:
    """What to do to a coded picture, in this order: transpose it, reverse its rows, reverse its columns."""

    transpose: bool = False
    reverse_rows: bool = False
    reverse_columns: bool = False
    skew_degrees: int = 0
    """An angle that is no quarter turn, clockwise; it is not applied."""

    def display_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) as shown, of a picture coded in these."""
        return (width, height) if self.transpose else (height, width)

    def apply(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:  # H W 3
        """A view of the picture as it is to be shown."""
        if self.transpose:
            picture = picture.transpose(1, 0, 2)
        if self.reverse_rows:
            picture = picture[::-1]
        if self.reverse_columns:
            picture = picture[:, ::-1]
        return picture

    @property
    def flags(self) -> NDArray[np.int32]:
        """(transpose, reverse rows, reverse columns), each 0 or 1."""
        return np.array([self.transpose, self.reverse_rows, self.reverse_columns], np.int32)

    @property
    def description(self) -> str:
        """In words; nothing for a picture that is shown as it is coded."""
        if self.skew_degrees:
            return f"to be rotated by {self.skew_degrees} degrees, which is not applied"
        rotations = {(False, True, True): 180, (True, False, True): 90, (True, True, False): 270}
        key = (self.transpose, self.reverse_rows, self.reverse_columns)
        if key in rotations:
            return f"rotated by {rotations[key]} degrees clockwise"
        return "mirrored" if any(key) else ""


UPRIGHT = Orientation()


def orientation_of(frame: "av.VideoFrame") -> Orientation:
    """What the frame's display matrix says; upright without one.

    The matrix (ISO/IEC 14496-12, 6.2.2) maps a coded position (x, y) to (a x + c y, b x + d y).
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return UPRIGHT
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    straight, turned = min(abs(a), abs(d)), min(abs(b), abs(c))
    if straight and max(abs(b), abs(c)) * 50 < straight:  # within one degree
        return Orientation(False, d < 0, a < 0)
    if turned and max(abs(a), abs(d)) * 50 < turned:
        return Orientation(True, b < 0, c < 0)
    return Orientation(skew_degrees=round(math.degrees(math.atan2(b, a))) % 360)
