"""Colour correction for decoders that ignore a video's tagged matrix.

DALI converts every video to RGB by BT.601, on the CPU and with NVDEC, whatever matrix its tag names; it
respects the tagged range. Both conversions are linear, so a matrix corrects the result, except where BT.601
clipped to 0 or 255. PyAV (FFmpeg) respects both tags. All three treat an untagged video as BT.601 of
limited range, also in HD: with a guess by size, scaling a clip would change its colours.
"""

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import VideoError

# Shares of red and blue in luma, by FFmpeg's number of the tag (ITU-T H.273, matrix coefficients). All
# other numbers mean BT.601, or are unknown and treated as BT.601, as in FFmpeg.
BT601 = (0.299, 0.114)
LUMA_SHARES = {
    1: (0.2126, 0.0722),  # BT.709
    4: (0.30, 0.11),  # FCC
    7: (0.212, 0.087),  # SMPTE 240M
    9: (0.2627, 0.0593),  # BT.2020
}

YCGCO = 8

# Tags that FFmpeg's converter refuses, with their meaning (ITU-T H.273, table 4).
UNSUPPORTED_MATRICES = {
    YCGCO: "YCgCo",
    10: "BT.2020 with constant luminance",
    11: "SMPTE ST 2085",
    12: "a matrix derived from its primaries",
    13: "a matrix derived from its primaries, with constant luminance",
    14: "ICtCp",
    15: "IPT-C2",
    16: "YCgCo-Re",
    17: "YCgCo-Ro",
}

IDENTITY = np.eye(3, 4, dtype=np.float32)


def color_correction(colorspace: int) -> NDArray[np.float32]:
    """The matrix and offset, (3, 4), from RGB by BT.601 to RGB by the tag; levels of 0 to 255."""
    if colorspace not in LUMA_SHARES:
        return IDENTITY.copy()
    tagged = rgb_from_ycc(*LUMA_SHARES[colorspace])
    corrected = IDENTITY.copy()
    corrected[:, :3] = tagged @ np.linalg.inv(rgb_from_ycc(*BT601))
    return corrected


def check_colorspace(colorspace: int) -> None:
    """Raises VideoError for a tag whose colours FFmpeg cannot convert to RGB."""
    if colorspace in UNSUPPORTED_MATRICES:
        how = " with `ffmpeg -i IN -vf zscale=matrix=709 OUT`" if colorspace == YCGCO else " as BT.709"
        raise VideoError(
            f"has colours in {UNSUPPORTED_MATRICES[colorspace]}, which FFmpeg does not convert to RGB; "
            f"re-encode it{how}"
        )


def rgb_from_ycc(red: float, blue: float) -> NDArray[np.float64]:
    """The matrix (3, 3) from luma (0 to 1) and colour differences Cb and Cr (-0.5 to 0.5) to R, G, B.

    red, blue: their shares of luma; green has the rest.
    """
    green = 1 - red - blue
    from_blue, from_red = 2 * (1 - blue), 2 * (1 - red)
    return np.array(
        [
            [1, 0, from_red],
            [1, -from_blue * blue / green, -from_red * red / green],
            [1, from_blue, 0],
        ]
    )
