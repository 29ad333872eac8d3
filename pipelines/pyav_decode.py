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


def decode_frames(source: Path | bytes, indices: NDArray[np.integer]) -> NDArray[np.uint8]:
    """The frames at `indices`, any order, repeats allowed, as RGB of shape (T, H, W, 3).

    Raises VideoDefect when the file cannot be opened, holds fewer frames than asked for, or breaks before the
    last wanted frame.
    """
    with open_video(source) as (container, stream):
        return _decode(container, stream, indices)


def _decode(
    container: "av.container.InputContainer",
    stream: "av.video.stream.VideoStream",
    indices: NDArray[np.integer],
) -> NDArray[np.uint8]:
    stream.thread_type = "NONE"  # parallelism is over clips; frame threads would add copies and delay
    times, keyframes = frame_index(container, stream)
    wanted = sorted(set(indices.tolist()))
    if wanted[-1] >= len(times):
        raise VideoDefect(f"holds {len(times)} frames, frame {wanted[-1]} was asked for")

    converter = VideoReformatter()  # one for all frames: setting it up costs more than a small frame
    found: dict[int, NDArray[np.uint8]] = {}
    frames: Iterator[av.VideoFrame] = iter(())
    position = -1  # time of the last frame that came out
    for index in wanted:
        target = times[index]
        keyframe = keyframes[max(0, bisect_right(keyframes, target) - 1)]
        if position < 0 or keyframe > position:
            # A keyframe of an open group shows frames before it as broken: they are not wanted, and skipped.
            container.seek(keyframe, stream=stream, backward=True)
            frames = container.decode(stream)
        for frame in frames:
            if frame.pts is None or frame.pts < target:
                continue
            position = frame.pts
            if position == target:
                picture = converter.reformat(frame, format="rgb24").to_ndarray()
                found[index] = picture.astype(np.uint8, copy=False)
            break
        if index not in found:
            raise VideoDefect(f"breaks at or before frame {index} of {len(times)}")
    return np.stack([found[index] for index in indices.tolist()])
