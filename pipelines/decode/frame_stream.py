"""All frames of a video in the order they are shown, one after another: for long videos.

The video is demuxed once, to number and time its frames, and decoded once for each pass. Memory does not grow
with its length but for about 60 bytes a frame.
"""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from pipelines.decode.demux import VideoIndex, open_video, read_index
from pipelines.decode.pyav import decode_all, frames_in_order, to_rgb
from pipelines.errors import VideoError, format_unexpected

DEFAULT_RATE = Fraction(25)
"""Frames per second of a file that does not say, as FFmpeg takes it for raw streams."""


class FrameStream:
    """A video whose frames are decoded in their order; frame numbers are those of `decode_frames`.

    path: the file. frames: how many it has. seconds: when each is shown, counted from the first, ascending;
    where the container's times are of no use, by the frame rate. rate: average frames per second. duration:
    seconds until the last frame ends.
    """

    def __init__(self, path: Path) -> None:
        """Demuxes the file; where its times do not say in which order frames are shown, decodes it too, to
        count them. Raises VideoError where it cannot be used.
        """
        self.path = path
        try:
            with open_video(path) as (container, stream):
                self._index = read_index(container, stream)
                rate = stream.average_rate or stream.guessed_rate
                unit = stream.time_base
            self.rate = Fraction(rate) if rate else DEFAULT_RATE
            self.seconds = _seconds(path, self._index, unit, self.rate)
        except VideoError:
            raise
        except Exception as error:
            raise VideoError(format_unexpected(error)) from error
        self.frames = len(self.seconds)
        self.duration = float(self.seconds[-1]) + 1 / float(self.rate)

    def pictures(self, wanted: NDArray[np.bool_] | None = None) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Number and picture, (H, W, 3) RGB as shown, of each frame that is wanted, or of all, ascending.

        wanted: whether each frame is, (frames,).

        Raises VideoError where a frame before the last wanted one is found damaged, or the file ends early.
        """
        converter = VideoReformatter()
        last = self.frames - 1 if wanted is None else int(np.flatnonzero(wanted).max(initial=-1))
        number = -1
        try:
            for number, (frame, shape) in enumerate(frames_in_order(self.path, self._index, threads=True)):
                if number > last:
                    return
                if wanted is None or wanted[number]:
                    yield number, shape.orientation.apply(to_rgb(converter, frame))
        except VideoError:
            raise
        except Exception as error:
            raise VideoError(format_unexpected(error)) from error
        if number < last:
            raise VideoError(f"breaks at or before frame {number + 1} of {self.frames}")


def _seconds(path: Path, index: VideoIndex, unit: Fraction, rate: Fraction) -> NDArray[np.float64]:
    if not index.ordered:
        return np.arange(decode_all(path, index, convert=False)) / float(rate)
    times = np.array([index.times[packet] for packet in index.display_order], np.int64)
    return (times - times[0]) * float(unit)
