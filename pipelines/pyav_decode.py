"""Frame-exact decoding with PyAV: any codec FFmpeg knows, only the groups of pictures that are needed.

Frame numbers count frames in the order they are shown. A file is demuxed once, without decoding, for its time
stamps and keyframes; the decoder then jumps only where a later keyframe lies at or before the next wanted
frame, and frames are matched by time stamp. This gives the same pixels as decoding everything.
"""

import io
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from . import VideoDefect


def decode_frames(source: Path | bytes, indices: NDArray[np.integer]) -> NDArray[np.uint8]:
    """The frames at `indices`, any order, repeats allowed, as RGB of shape (T, H, W, 3).

    Raises VideoDefect when the file cannot be opened, holds fewer frames than asked for, or breaks before the
    last wanted frame.
    """
    if not isinstance(source, bytes):
        try:
            size = source.stat().st_size
        except OSError as error:
            raise VideoDefect(f"cannot be read: {error.strerror}") from error
        if size == 0:
            raise VideoDefect("is empty (0 bytes)")
    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as container:
            return _decode(container, indices)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoDefect(f"cannot be decoded: {error}") from error


def _decode(container: "av.container.InputContainer", indices: NDArray[np.integer]) -> NDArray[np.uint8]:
    if not container.streams.video:
        raise VideoDefect("holds no video stream")
    stream = container.streams.video[0]
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


def frame_index(
    container: "av.container.InputContainer", stream: "av.video.stream.VideoStream"
) -> tuple[list[int], list[int]]:
    """Presentation times of all frames and of the keyframes, ascending, without decoding."""
    times, keyframes = [], []
    for packet in container.demux(stream):
        if packet.pts is None or packet.size == 0 or packet.is_discard:
            continue
        times.append(packet.pts)
        if packet.is_keyframe:
            keyframes.append(packet.pts)
    if not keyframes:
        raise VideoDefect("holds no keyframe")
    return sorted(times), sorted(keyframes)
