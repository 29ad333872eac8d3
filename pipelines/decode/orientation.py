"""The display matrix of a video: how its coded pictures are rotated and mirrored for display.

A rotation by 90 or 270 degrees transposes, then reverses rows or columns. Rotations by other angles are not
applied, as they would leave empty corners.
"""

import math
from dataclasses import dataclass

import av
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Orientation:
    """Operations on a coded picture in this order: transpose, reverse rows, reverse columns."""

    transpose: bool = False
    """Whether rows and columns are swapped."""
    reverse_rows: bool = False
    """Whether the order of the rows is reversed."""
    reverse_columns: bool = False
    """Whether the order of the columns is reversed."""
    skew_degrees: int = 0
    """A clockwise rotation that is no multiple of 90 degrees; it is not applied."""

    def display_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) as displayed, for a coded size."""
        return (width, height) if self.transpose else (height, width)

    def apply(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:  # H W 3
        """The picture as displayed, as a NumPy view."""
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
        """As text; empty for a picture that is displayed as coded."""
        if self.skew_degrees:
            return f"rotation by {self.skew_degrees} degrees not applied"
        rotations = {(False, True, True): 180, (True, False, True): 90, (True, True, False): 270}
        key = (self.transpose, self.reverse_rows, self.reverse_columns)
        if key in rotations:
            return f"rotated by {rotations[key]} degrees clockwise"
        return "mirrored" if any(key) else ""


UPRIGHT = Orientation()


def orientation_of(frame: "av.VideoFrame") -> Orientation:
    """The orientation in the frame's display matrix; upright without one.

    The matrix (ISO/IEC 14496-12, 6.2.2) maps a coded position (x, y) to (a x + c y, b x + d y).
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return UPRIGHT
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    upright, rotated = min(abs(a), abs(d)), min(abs(b), abs(c))
    if upright and max(abs(b), abs(c)) * 50 < upright:  # within one degree
        return Orientation(False, d < 0, a < 0)
    if rotated and max(abs(a), abs(d)) * 50 < rotated:
        return Orientation(True, b < 0, c < 0)
    return Orientation(skew_degrees=round(math.degrees(math.atan2(b, a))) % 360)
