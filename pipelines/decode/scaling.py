"""Scaling frames down while they are decoded: their size afterwards."""


def scaled_size(height: int, width: int, max_short_side: int | None) -> tuple[int, int]:
    """(height, width) of frames after the decoder's scaling, in pixels.

    max_short_side: of the scaled frames; None, and a shorter short side, keep the size. The other side is
    rounded to the nearest pixel.
    """
    short = min(height, width)
    if max_short_side is None or short <= max_short_side:
        return height, width
    long = (max(height, width) * max_short_side + short // 2) // short
    return (max_short_side, long) if height <= width else (long, max_short_side)
