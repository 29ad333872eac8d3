"""Streams all frames of a long video in display order.

The video is demuxed once, to number and time its frames, and decoded once per pass. Memory grows by about
60 bytes a frame.
"""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from pipelines.decode.demux import VideoIndex, open_video, read_index
from pipelines.decode.jpeg_frames import decode_frame, list_frames
from pipelines.decode.pyav import decode_all, displayed_rgb, frames_in_order
from pipelines.errors import VideoError, unexpected_as_video_error

DEFAULT_RATE = Fraction(25)
"""Frames per second of a file without a frame rate; FFmpeg's default for raw streams."""


class FrameStream:
    """A video whose frames are decoded in display order, with the frame numbers of `decode_frames`.

    path: the file.
    frames: number of frames.
    seconds: display time of each frame from the first, ascending; by the frame rate if the container has no
        usable times.
    rate: average frames per second.
    duration: seconds until the last frame ends.
    """

    def __init__(self, path: Path) -> None:
        """Demux the file; also decode it to count the frames if its times do not define the display order.

        Raises VideoError for an unusable video.
        """
        self.path = path
        if path.is_dir():
            raise VideoError("is a folder; a video file is needed here")
        with unexpected_as_video_error():
            with open_video(path) as (container, stream):
                self._index = read_index(container, stream)
                rate = stream.average_rate or stream.guessed_rate
                unit = stream.time_base
            self.rate = Fraction(rate) if rate else DEFAULT_RATE
            self.seconds = _seconds(path, self._index, unit, self.rate)
        self.frames = len(self.seconds)
        self.duration = float(self.seconds[-1]) + 1 / float(self.rate)

    def pictures(
        self, wanted: NDArray[np.bool_] | None = None, max_short_side: int | None = None
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Number and displayed picture, (H, W, 3) RGB, of the wanted frames or of all, ascending.

        wanted: (frames,), true for the frames to return. max_short_side: as for `decode_frames`.

        Raises VideoError if a frame up to the last wanted one is damaged or missing.
        """
        converter = VideoReformatter()
        last = self.frames - 1 if wanted is None else int(np.flatnonzero(wanted).max(initial=-1))
        number = -1
        with unexpected_as_video_error():
            for number, (frame, shape) in enumerate(frames_in_order(self.path, self._index, threads=True)):
                if number > last:
                    return
                if wanted is None or wanted[number]:
                    yield number, displayed_rgb(converter, frame, shape, max_short_side)
        if number < last:
            raise VideoError(f"breaks at or before frame {number + 1} of {self.frames}")


class FolderStream:
    """A folder of JPEG frames with the attributes and methods of `FrameStream`."""

    def __init__(self, folder: Path, rate: Fraction) -> None:
        """rate: frames per second. Raises VideoError as `list_frames`."""
        self._folder = folder
        self._names = list_frames(folder)
        self.frames = len(self._names)
        self.rate = rate
        self.seconds = np.arange(self.frames) / float(rate)
        self.duration = self.frames / float(rate)

    def pictures(self, wanted: NDArray[np.bool_] | None = None) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """As `FrameStream.pictures`."""
        for number in range(self.frames) if wanted is None else np.flatnonzero(wanted).tolist():
            yield number, decode_frame(self._folder, self._names, number)


def frames_between(seconds: NDArray[np.float64], start: float, end: float) -> tuple[int, int]:
    """Number of the first frame that begins in [start, end), and their count.

    If none begins there, it is the frame that is still shown at `start`.

    seconds: when each frame is shown, ascending.
    """
    # Times are multiples of the container's time base: a frame that begins with the segment belongs to it.
    first, after = np.searchsorted(seconds, np.array([start, end]) - 1e-6).tolist()
    return (first, after - first) if after > first else (max(first - 1, 0), 1)


def _seconds(path: Path, index: VideoIndex, unit: Fraction, rate: Fraction) -> NDArray[np.float64]:
    if not index.ordered:
        return np.arange(decode_all(path, index, convert=False)) / float(rate)
    times = np.array([index.times[packet] for packet in index.display_order], np.int64)
    return (times - times[0]) * float(unit)
