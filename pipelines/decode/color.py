"""What colour a video's numbers mean: RGB matrices for decoders that do not look at the tag.

DALI turns every video into RGB by BT.601, on the CPU and with NVDEC, whatever matrix its tag names; it does
heed the tagged range. Both conversions are linear, so a matrix mends it afterwards, except where BT.601 had
left the range of 0 to 255. PyAV (FFmpeg) heeds both. A video without a tag is BT.601 of limited range to all
of them, also in HD: guessing by size would make the same clip, scaled, change its colours.
"""

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import VideoError

# Shares of red and blue in luma, by FFmpeg's number of the tag (ITU-T H.273, matrix coefficients). Numbers
# that are not listed mean BT.601, or are unknown and treated as FFmpeg treats them: as BT.601.
BT601 = (0.299, 0.114)
LUMA_SHARES = {
    1: (0.2126, 0.0722),  # BT.709
    4: (0.30, 0.11),  # FCC
    7: (0.212, 0.087),  # SMPTE 240M
    9: (0.2627, 0.0593),  # BT.2020
}

YCGCO = 8

# Tags that FFmpeg's converter refuses, and what they mean (ITU-T H.273, table 4).
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
    """(3, 4): matrix and offset that turn RGB made by BT.601 into RGB by the tag, in levels of 0 to 255."""
    if colorspace not in LUMA_SHARES:
        return IDENTITY.copy()
    tagged = rgb_from_ycc(*LUMA_SHARES[colorspace])
    corrected = IDENTITY.copy()
    corrected[:, :3] = tagged @ np.linalg.inv(rgb_from_ycc(*BT601))
    return corrected


def check_colorspace(colorspace: int) -> None:
    """Raise VideoError for a tag whose colours cannot be converted to RGB."""
    if colorspace in UNSUPPORTED_MATRICES:
        how = " with `ffmpeg -i IN -vf zscale=matrix=709 OUT`" if colorspace == YCGCO else " as BT.709"
        raise VideoError(
            f"has colours in {UNSUPPORTED_MATRICES[colorspace]}, which FFmpeg does not convert to RGB; "
            f"encode it anew{how}"
        )


def rgb_from_ycc(red: float, blue: float) -> NDArray[np.float64]:
    """(3, 3): R, G, B from luma and the colour differences Cb and Cr, both of -0.5 to 0.5 for luma of 0 to 1.

    red, blue: their shares in luma; green has the rest.
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
