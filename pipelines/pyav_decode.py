"""Frame-exact decoding with PyAV: any codec FFmpeg knows, only the groups of pictures that are needed.

Frame numbers count frames in the order they are shown. A file is demuxed once, without decoding, for its time
stamps and keyframes; the decoder then jumps only where a later keyframe lies at or before the next wanted
frame, and frames are matched by time stamp. This gives the same pixels as decoding everything.
"""

from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from . import VideoDefect
from .container import frame_index, open_video

# Containers with an index of their own. Others (AVI, MPEG program and transport streams) are sought by the
# decoding time, and what comes out first after that may carry a wrong time.
SEEKABLE = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"})


def decode_frames(source: Path | bytes, indices: NDArray[np.integer]) -> NDArray[np.uint8]:
    """The frames at `indices`, any order, repeats allowed, as RGB of shape (T, H, W, 3).

    Raises VideoDefect when the file cannot be opened, holds fewer frames than asked for, or breaks before the
    last wanted frame.
    """
    with open_video(source) as (container, stream):
        times, keyframes = frame_index(container, stream)
        last = int(indices.max())
        if last >= len(times):
            raise VideoDefect(f"holds {len(times)} frames, frame {last} was asked for")
        wanted = sorted({times[index] for index in indices.tolist()})
        seekable = container.format.name in SEEKABLE
        found = _decode(container, stream, wanted, keyframes) if seekable else {}
    if len(found) < len(wanted):
        with open_video(source) as (container, stream):
            found = _decode(container, stream, wanted, keyframes=[])
    missing = [times.index(time) for time in wanted if time not in found]
    if missing:
        raise VideoDefect(f"breaks at or before frame {missing[0]} of {len(times)}")
    return np.stack([found[times[index]] for index in indices.tolist()])


def _decode(
    container: "av.container.InputContainer",
    stream: "av.video.stream.VideoStream",
    wanted: list[int],
    keyframes: list[int],
) -> dict[int, NDArray[np.uint8]]:
    """The frames of the `wanted` times, ascending, as far as they are found.

    keyframes: times that may be jumped to; without any, everything is decoded from where the container is.
    """
    stream.thread_type = "NONE"  # parallelism is over clips; frame threads would add copies and delay
    converter = VideoReformatter()  # one for all frames: setting it up costs more than a small frame
    found: dict[int, NDArray[np.uint8]] = {}
    frames: Iterator[av.VideoFrame] = iter(()) if keyframes else container.decode(stream)
    position: int | None = None  # time of the last frame that came out
    for target in wanted:
        before = bisect_right(keyframes, target)
        if before and (position is None or keyframes[before - 1] > position):
            # A keyframe of an open group shows frames before it as broken: they are not wanted, and skipped.
            container.seek(keyframes[before - 1], stream=stream, backward=True)
            frames = container.decode(stream)
        for frame in frames:
            if frame.pts is None or frame.pts < target:
                continue
            position = frame.pts
            if position == target:
                picture = converter.reformat(frame, format="rgb24").to_ndarray()
                found[target] = picture.astype(np.uint8, copy=False)
            break
    return found
