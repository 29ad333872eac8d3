"""Sliding windows over the time of a long video, and the frames that represent each."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.sampling.temporal import view_indices


@dataclass(frozen=True, slots=True)
class TimeWindow:
    """A window and the frames shown in it."""

    start: float
    """Seconds."""
    end: float
    """Seconds."""
    first: int
    """Number of its first frame."""
    frames: int
    """Count of its frames, at least 1."""

    def indices(self, clip_frames: int, clips: int) -> NDArray[np.int32]:
        """(clips x T,) frame numbers: those of `view_indices` for the window's frames."""
        return self.first + view_indices(self.frames, clip_frames, clips).reshape(-1)


def sliding_windows(
    seconds: NDArray[np.float64], duration: float, length: float, stride: float
) -> list[TimeWindow]:
    """Windows of `length` seconds, one every `stride` seconds from 0 on.

    Where they do not reach the end of the video, there is one more that ends with it. A video shorter than a
    window is one window. A window in which no frame begins has the frame that is still shown.

    seconds: when each frame is shown, ascending. duration: when the last one ends.
    """
    span = min(length, duration)
    count = int((duration - span) / stride + 1e-9) + 1
    starts = [number * stride for number in range(count)]
    if starts[-1] + span < duration - 1e-6:
        starts.append(duration - span)
    ends = [start + span for start in starts]
    # Times are multiples of the container's time base: a frame that begins with a window belongs to it.
    first = np.searchsorted(seconds, np.array(starts) - 1e-6)
    after = np.searchsorted(seconds, np.array(ends) - 1e-6)
    windows = []
    for start, end, begin, stop in zip(starts, ends, first.tolist(), after.tolist(), strict=True):
        empty = stop <= begin
        windows.append(
            TimeWindow(start, end, max(begin - 1, 0) if empty else begin, 1 if empty else stop - begin)
        )
    return windows
