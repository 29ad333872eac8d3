"""Windows that slide over the time of a long video, and which of its frames each of them is seen by."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.sampling.temporal import view_indices


@dataclass(frozen=True, slots=True)
class TimeWindow:
    """start, end: in seconds. first, frames: the first frame shown in it, and how many are."""

    start: float
    end: float
    first: int
    frames: int

    def indices(self, clip_frames: int, clips: int) -> NDArray[np.int32]:
        """(clips x T,) frame numbers: the rule of `view_indices`, inside the window."""
        return self.first + view_indices(self.frames, clip_frames, clips).reshape(-1)


def sliding_windows(
    seconds: NDArray[np.float64], duration: float, length: float, stride: float
) -> list[TimeWindow]:
    """Windows of `length` seconds, one every `stride` seconds from 0 on, and a last one that ends with the
    video where the others do not reach its end. A video shorter than a window is one window.

    seconds: when each frame is shown, ascending. duration: when the last one ends. A window in which no frame
    begins has the one that is still shown.
    """
    span = min(length, duration)
    count = int((duration - span) / stride + 1e-9) + 1
    starts = [number * stride for number in range(count)]
    if starts[-1] + span < duration - 1e-6:
        starts.append(duration - span)
    ends = [start + span for start in starts]
    # Times are multiples of the container's unit: a frame that begins with a window belongs to it.
    first = np.searchsorted(seconds, np.array(starts) - 1e-6)
    after = np.searchsorted(seconds, np.array(ends) - 1e-6)
    windows = []
    for start, end, begin, stop in zip(starts, ends, first.tolist(), after.tolist(), strict=True):
        empty = stop <= begin
        windows.append(
            TimeWindow(start, end, max(begin - 1, 0) if empty else begin, 1 if empty else stop - begin)
        )
    return windows
