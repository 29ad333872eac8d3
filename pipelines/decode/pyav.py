"""Frame-exact decoding with PyAV: any codec FFmpeg knows, only the packets that are needed.

Frame numbers count frames in the order the decoder gives them out, as the ffmpeg program does. A file is
demuxed once, without decoding; the decoder is then fed from the keyframe that a wanted frame builds on up to
that frame, and nothing else. It never seeks: what a container makes of a time (AVI and MPEG streams: not
much) does not matter. This gives the same pixels as decoding everything. Where the container's times do not
say in which order frames are shown, everything is decoded and the frames are counted.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from pipelines.decode.color import check_colorspace
from pipelines.decode.demux import (
    FIELDS_UNKNOWN,
    PROGRESSIVE,
    VideoIndex,
    ffmpeg_message,
    open_video,
    read_index,
    stored_packets,
)
from pipelines.decode.orientation import Orientation
from pipelines.decode.stream_decoder import StreamDecoder
from pipelines.errors import VideoError

KEPT_BYTES = 64 * 2**20  # of packets in memory; a video with more is demuxed a second time

# Codecs whose frames say by themselves that nothing refers to them, so that leaving one out changes no other.
# Not so HEVC (frames of a higher temporal layer may refer to it), VP8 and VP9 (their motion vectors,
# probabilities and segments may be reused); AV1's decoder takes the setting at its start only.
SKIPPABLE = frozenset({"h264", "mpeg2video", "mpeg4"})

Roi = tuple[int, int, int, int]


def decode_frames(
    source: Path | bytes,
    indices: NDArray[np.integer],
    roi: Roi | None = None,
    *,
    size: tuple[int, int] | None = None,
) -> NDArray[np.uint8]:
    """The frames at `indices`, any order, repeats allowed, as RGB of shape (T, H, W, 3).

    Args:
        source: a file, or its content.
        window: (top, left, bottom, right) in pixels, as shown; only this part of the frames is returned.
        size: (height, width) in pixels, as shown, that the frames must have.

    Raises:
        VideoError: the file cannot be opened, has frames of another size or fewer than asked for, or is
            found damaged in what has to be decoded.
    """
    with open_video(source) as (container, stream):
        index = read_index(container, stream, keep_bytes=KEPT_BYTES)
        check_frames(indices, len(index.display_order))
        clip = _Clip(indices, roi, size)
        runs = _runs(index, sorted(index.display_order[number] for number in clip.places))
        whole = [(index.keyframes[0], len(index.times) - 1)]
        if index.packets is not None:
            times_hold = _fill(clip, stream, index.packets, index, runs)
    if index.packets is None:
        times_hold = _fill_from(source, clip, index, runs)
    if times_hold and clip.places and runs != whole:
        # What the container calls a keyframe is none (H.264 that refreshes the picture piece by piece).
        times_hold = _fill_from(source, clip, index, whole)
    if not times_hold:
        clip = _Clip(indices, roi, size)
        _fill_from(source, clip, replace(index, ordered=False), whole)
    if clip.places:
        raise VideoError(f"breaks at or before frame {min(clip.places)} of {len(index.display_order)}")
    return clip.pixels


def decode_first_frame(
    source: Path | bytes, stream: "av.video.stream.VideoStream", index: VideoIndex
) -> tuple["av.VideoFrame", "FrameShape"]:
    """The first frame that the video shows, and its shape.

    stream: of the open source; without packets in the index, it is opened once more.

    Raises VideoError where it cannot be decoded.
    """
    first: tuple[av.VideoFrame, FrameShape] | None = None
    if index.packets is not None:
        # The keyframe alone, without those that the decoder would hold back: it costs a third.
        alone = index.packets[index.keyframes[0] : index.keyframes[0] + 1]
        first = next(_shown_frames(stream, alone, replace(index, keyframes=[0])), None)
    if first is None:
        with open_video(source) as (container, again):
            first = next(_shown_frames(again, stored_packets(container, again), index), None)
    if first is None:
        raise VideoError("holds no frame that can be decoded")
    return first


def decode_all(source: Path | bytes, index: VideoIndex, *, convert: bool) -> int:
    """Decode the video to its end, with all checks of `decode_frames`; returns the number of frames.

    convert: turn each frame into RGB, too.

    Raises VideoError where `decode_frames` would refuse some of the frames.
    """
    frames = 0
    converter = VideoReformatter()
    for frame, _ in frames_in_order(source, index):
        if convert:
            to_rgb(converter, frame)
        frames += 1
    return frames


def frames_in_order(
    source: Path | bytes, index: VideoIndex, *, threads: bool = False
) -> Iterator[tuple["av.VideoFrame", "FrameShape"]]:
    """All frames of the video as they are shown, from the first on: frame k has number k.

    threads: decode with all cores, where the video begins with a frame that needs no other.

    Raises VideoError where `decode_frames` would refuse a frame.
    """
    before: FrameShape | None = None
    with open_video(source) as (container, stream):
        shown = _shown_frames(stream, stored_packets(container, stream), index, threads=threads)
        for number, (frame, shape) in enumerate(shown):
            if frame.is_corrupt:
                raise VideoError(f"is damaged in frame {number} of {len(index.display_order)}")
            _check_same(frame, shape, before, number)
            before = shape
            yield frame, shape


@dataclass(frozen=True, slots=True)
class FrameShape:
    """What all frames of a video must have in common. height, width: in pixels, as coded."""

    height: int
    width: int
    orientation: Orientation

    @property
    def display_size(self) -> tuple[int, int]:
        """(height, width) as shown."""
        return self.orientation.display_size(self.height, self.width)


def _check_same(frame: "av.VideoFrame", shape: FrameShape, before: FrameShape | None, number: int) -> None:
    """Raise VideoError for another shape than that of the frame before, and for colours that cannot be
    converted.
    """
    check_colorspace(int(frame.colorspace))
    if before is None or shape == before:
        return
    (height, width), (now_height, now_width) = before.display_size, shape.display_size
    if before.display_size != shape.display_size:
        change = f"from frames of {width}x{height} to {now_width}x{now_height}"
    else:
        change = "in how its frames are to be rotated"
    raise VideoError(f"changes {change} at or before frame {number}: encode it anew in one size")


class _Clip:
    """The frames to be returned, and where each of them goes.

    places: frame number → its places in `pixels`, emptied as they are filled. pixels: T H W 3; there is none
    before the first frame is known.
    """

    pixels: NDArray[np.uint8]

    def __init__(self, indices: NDArray[np.integer], roi: Roi | None, size: tuple[int, int] | None) -> None:
        self.places: dict[int, list[int]] = {}
        for place, number in enumerate(indices.tolist()):
            self.places.setdefault(number, []).append(place)
        self._length = len(indices)
        self._window = roi
        self._size = size
        self._shape: FrameShape | None = None
        # One converter for all frames: setting it up costs more than a small frame.
        self._converter = VideoReformatter()

    def take(self, number: int, frame: "av.VideoFrame", shape: FrameShape) -> None:
        """Fill the places of frame `number`."""
        _check_same(frame, shape, self._shape, number)
        if self._shape is None:
            self._begin(shape)
        picture = shape.orientation.apply(to_rgb(self._converter, frame))
        for place in self.places.pop(number):
            top, left, bottom, right = self._window or (0, 0, *shape.display_size)
            self.pixels[place] = picture[top:bottom, left:right]

    def _begin(self, shape: FrameShape) -> None:
        """Room for the frames, now that their shape is known."""
        check_size(shape, self._size)
        height, width = shape.display_size
        top, left, bottom, right = self._window or (0, 0, height, width)
        if not (0 <= top < bottom <= height and 0 <= left < right <= width):
            raise ValueError(f"window {self._window} does not lie in frames of {width}x{height}")
        self._shape = shape
        self.pixels = np.empty((self._length, bottom - top, right - left, 3), np.uint8)


def to_rgb(converter: VideoReformatter, frame: "av.VideoFrame") -> NDArray[np.uint8]:
    """The frame as full-range RGB, (H, W, 3), by the colour space and range it is tagged with."""
    return np.asarray(converter.reformat(frame, format="rgb24", threads=1).to_ndarray(), np.uint8)


def check_size(shape: FrameShape, expected: tuple[int, int] | None) -> None:
    """Raise VideoError where frames are not of the (height, width) that the manifest says."""
    height, width = shape.display_size
    if expected is None or (height, width) == tuple(expected):
        return
    if tuple(expected) == (shape.height, shape.width):
        why = "without the rotation that the file asks for, as manifests had it before"
    else:
        why = "the file changed since"
    raise VideoError(
        f"has frames of {width}x{height}, the manifest says {expected[1]}x{expected[0]}; {why}: make the "
        "manifest anew"
    )


def check_frames(indices: NDArray[np.integer], frames: int) -> None:
    """Raise VideoError where one of `indices` lies beyond the last of `frames` frames."""
    last = int(np.max(indices))
    if last >= frames:
        raise VideoError(f"holds {frames} frames, frame {last} was asked for")


def _runs(index: VideoIndex, needed: list[int]) -> list[tuple[int, int]]:
    """What to decode for the `needed` packets, as (first, last) packets, ascending."""
    if not index.ordered:
        return [(index.keyframes[0], len(index.times) - 1)]
    runs: list[tuple[int, int]] = []
    for last in needed:
        place = bisect_right(index.keyframes, last) - 1
        # What is stored after a keyframe but shown before it may build on what was stored before that.
        while place > 0 and not _precedes(index.times[index.keyframes[place]], index.times[last]):
            place -= 1
        first = index.keyframes[place]
        while runs and first <= runs[-1][1]:
            first = min(first, runs.pop()[0])
        runs.append((first, last))
    return runs


def _precedes(time: int | None, other: int | None) -> bool:
    """Whether both are known, and the first is not later."""
    return time is not None and other is not None and time <= other


def _fill_from(source: Path | bytes, clip: _Clip, index: VideoIndex, runs: list[tuple[int, int]]) -> bool:
    """As `_fill`, with the packets demuxed once more."""
    with open_video(source) as (container, stream):
        return _fill(clip, stream, stored_packets(container, stream), index, runs)


def _fill(
    clip: _Clip,
    stream: "av.video.stream.VideoStream",
    packets: Iterable["av.Packet"],
    index: VideoIndex,
    runs: list[tuple[int, int]],
) -> bool:
    """Decode the runs and take the wanted frames; leaves at the first sign that the container does not tell
    the truth about times or keyframes, with the places it could not fill.

    packets: all of the stream, as the index numbers them.

    Returns False where frames do not come out in the order of their times: none of those taken counts.
    """
    codec = StreamDecoder(stream)
    shown = {index.times[index.display_order[number]]: number for number in clip.places}
    needed = {index.display_order[number] for number in clip.places} if index.ordered else set()
    remaining, position = iter(packets), 0
    for first, last in runs:
        start = index.times[first] if index.ordered else None
        latest: int | None = None
        run = enumerate(islice(remaining, first - position, last + 1 - position), first)
        for count, frame in enumerate(_frames(codec, run, start, needed, index)):
            time = frame.pts
            if index.ordered and (time is None or (latest is not None and time <= latest)):
                return False
            latest = time
            if start is not None and time is not None:
                if time < start:
                    continue  # may lack what it builds on, and is not wanted
                if time == start and first > index.keyframes[0] and not codec.is_intra(frame):
                    return True
            if frame.is_corrupt:
                raise VideoError(f"is damaged at or before frame {_place(index, time, count)}")
            number = shown.get(time) if index.ordered else count
            if number in clip.places:
                clip.take(number, frame, _shape_of(frame, codec))
            if not clip.places:
                return True
        position = last + 1
    return True


def _shown_frames(
    stream: "av.video.stream.VideoStream",
    packets: Iterable["av.Packet"],
    index: VideoIndex,
    *,
    threads: bool = False,
) -> Iterator[tuple["av.VideoFrame", FrameShape]]:
    """All frames that the video shows, as the decoder gives them out. packets: all of the stream."""
    # With threads, errors come some packets late: one of a frame that is not shown would pass for another's.
    codec = StreamDecoder(stream, threads=threads and index.starts_clean)
    run = islice(enumerate(packets), index.keyframes[0], None)
    for frame in _frames(codec, run, index.start, set(), index):
        if index.start is None or frame.pts is None or frame.pts >= index.start:
            yield frame, _shape_of(frame, codec)


def _frames(
    codec: StreamDecoder,
    run: Iterable[tuple[int, "av.Packet"]],
    start: int | None,
    needed: set[int],
    index: VideoIndex,
) -> Iterator["av.VideoFrame"]:
    """What comes out of the decoder for a run of packets, without the frames that can be left out.

    start: the time of the run's keyframe. needed: packets whose frames are wanted; none
    given: all frames are.
    """
    # A frame of two fields may come in two packets, of which the index knows one as the frame's.
    spares = bool(needed) and codec.name in SKIPPABLE and codec.field_order in (FIELDS_UNKNOWN, PROGRESSIVE)
    spared = False
    for ordinal, packet in run:
        if spares and spared != (ordinal not in needed):
            spared = not spared
            codec.skip_unreferenced(spared)
        try:
            yield from codec.decode(packet)
        except av.FFmpegError as error:
            if start is not None and packet.pts is not None and packet.pts < start:
                continue  # lacks what it builds on
            number = _place(index, packet.pts, ordinal)
            raise VideoError(f"is damaged at or before frame {number}: {ffmpeg_message(error)}") from error
    yield from codec.decode(None)
    codec.end()


def _shape_of(frame: "av.VideoFrame", codec: StreamDecoder) -> FrameShape:
    return FrameShape(frame.height, frame.width, codec.orientation(frame))


def _place(index: VideoIndex, time: int | None, count: int) -> str:
    """Where in the video: the number of the frame shown at `time`, by the times or by the count."""
    number = count
    if index.ordered and time is not None:
        number = sum(_precedes(index.times[packet], time - 1) for packet in index.display_order)
    return f"{number} of {len(index.display_order)}"
