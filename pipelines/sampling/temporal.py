"""Which frames of a video make a clip: sparse sampling over its whole length.

A video of `n` frames is divided into `T` segments of `(n - 1) / T` frames; a clip has one frame of each.
Rounding is half-to-even throughout, as in the released implementation.
"""

import numpy as np
from numpy.typing import NDArray


def train_indices(frames: int, clip_frames: int, rng: np.random.Generator) -> NDArray[np.int32]:
    """One random frame of each segment, both ends of a segment included: (T,), ascending.

    frames: length of the video, at least 1. clip_frames: T. A video of fewer frames repeats some of them.
    """
    edges = np.round((frames - 1) / clip_frames * np.arange(clip_frames + 1)).astype(np.int64)
    drawn = rng.integers(edges[:-1], edges[1:], endpoint=True)
    return np.minimum(drawn, frames - 1).astype(np.int32)


def view_indices(frames: int, clip_frames: int, clips: int) -> NDArray[np.int32]:
    """The frames of `clips` evenly shifted clips: (clips, T), each row ascending.

    With K clips and segments of s frames, frame i of clip c is `round(s*i) + int(s/(K+1)*(c+1))`.
    """
    segment = (frames - 1) / clip_frames
    starts = np.round(segment * np.arange(clip_frames)).astype(np.int64)
    shifts = (segment / (clips + 1) * np.arange(1, clips + 1)).astype(np.int64)
    return np.minimum(starts[None, :] + shifts[:, None], frames - 1).astype(np.int32)
