"""Frame-exact decoding with PyAV, in any codec of FFmpeg, of the needed packets only.

Frame numbers count frames in the decoder's output order, as in the ffmpeg program. A file is demuxed once,
without decoding. The decoder then receives the packets from the keyframe that a wanted frame depends on up
to that frame, and no others. Nothing seeks, as seeking by time is unreliable in AVI and MPEG streams. The
pixels equal those of a full decode. If the container's times do not define the display order, everything is
decoded and the frames are counted.
"""

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from pipelines.decode.color import check_colorspace
from pipelines.decode.demux import (
    FIELDS_UNKNOWN,
    PROGRESSIVE,
    VideoIndex,
    ffmpeg_message,
    open_container,
    open_video,
    read_index,
    stored_packets,
)
from pipelines.decode.orientation import Orientation
from pipelines.decode.packet_index import PacketIndex
from pipelines.decode.scaling import scaled_size
from pipelines.decode.stream_decoder import StreamDecoder
from pipelines.decode.video_file import VideoContent, open_content
from pipelines.errors import VideoError
from pipelines.storage.byte_range_file import ByteRange

KEPT_BYTES = 64 * 2**20  # of packets in memory; a larger video is demuxed a second time

# Codecs that mark unreferenced frames, so that skipping one changes no other. Excluded: HEVC (frames of a
# higher temporal layer may refer to one), VP8 and VP9 (motion vectors, probabilities and segments may be
# reused), AV1 (its decoder accepts the setting at the start only).
SKIPPABLE = frozenset({"h264", "mpeg2video", "mpeg4"})

Roi = tuple[int, int, int, int]

_Decoded = tuple[VideoIndex, list[tuple[int, int]], bool]
"""The index of a video, the decoded runs, and what `_fill` returned for them."""


def decode_frames(
    source: VideoContent,
    indices: NDArray[np.integer],
    roi: Roi | None = None,
    *,
    size: tuple[int, int] | None = None,
    max_short_side: int | None = None,
    packets: PacketIndex | None = None,
) -> NDArray[np.uint8]:
    """The frames at `indices`, in any order and with repeats, as RGB: (T, H, W, 3).

    Args:
        source: a file, its content, or a part of a shard.
        roi: (top, left, bottom, right) in displayed pixels, after scaling; only this part of the frames is
            returned.
        size: (height, width) in displayed pixels that the frames must have in the video.
        max_short_side: scale the frames down to it (`scaled_size`) by averaging areas; None does not scale.
        packets: the video's packet index; only what the frames need is then read.

    Raises:
        VideoError: the file cannot be opened, its frames have another size or are too few, or a needed packet
            is damaged.
    """
    clip = _Clip(indices, roi, size, max_short_side)
    if packets is None:
        index, runs, times_valid = _decode_by_demuxing(source, clip)
    else:
        index, runs, times_valid = _decode_by_index(source, clip, packets)
    whole = [(index.keyframes[0], len(index.times) - 1)]
    if times_valid and clip.positions and runs != whole:
        # A marked keyframe is none: H.264 with periodic intra refresh.
        times_valid = _fill_from(source, clip, index, whole)
    if not times_valid:
        clip = _Clip(indices, roi, size, max_short_side)
        _fill_from(source, clip, replace(index, ordered=False), whole)
    if clip.positions:
        raise VideoError(f"breaks at or before frame {min(clip.positions)} of {len(index.display_order)}")
    return clip.pixels


def _decode_by_demuxing(source: VideoContent, clip: "_Clip") -> "_Decoded":
    """Demux the whole video, and decode what the clip needs."""
    with open_video(source) as (container, stream):
        index = read_index(container, stream, keep_bytes=KEPT_BYTES)
        runs = _wanted_runs(clip, index)
        if index.packets is not None:
            return index, runs, _fill(clip, stream, _split(index.packets, runs), index, runs)
    return index, runs, _fill_from(source, clip, index, runs)


def _decode_by_index(source: VideoContent, clip: "_Clip", packets: PacketIndex) -> "_Decoded":
    """Read and decode what the clip needs.

    Raises VideoError if the video has another size than its index.
    """
    index = packets.video_index
    runs = _wanted_runs(clip, index)
    with open_content(source) as file:
        check_indexed_size(file.seek(0, os.SEEK_END), packets)
        file.load(packets.ranges(runs))
        with open_container(file) as (_, stream):
            stored = (packets.packets(file, stream, first, last) for first, last in runs)
            return index, runs, _fill(clip, stream, stored, index, runs)


def check_indexed_size(size: int, packets: PacketIndex) -> None:
    """Raises VideoError if a video of `size` bytes is not the indexed one."""
    if size != packets.size:
        raise VideoError(
            f"has {size} bytes, but {packets.size} in the packet index: the file was changed; make a new "
            "manifest"
        )


def wanted_ranges(packets: PacketIndex, indices: NDArray[np.integer]) -> list[ByteRange]:
    """The bytes that `decode_frames` reads for the frames at `indices`.

    Raises VideoError for frames beyond the last.
    """
    index = packets.video_index
    return packets.ranges(_wanted_runs(_Clip(indices), index))


def _wanted_runs(clip: "_Clip", index: VideoIndex) -> list[tuple[int, int]]:
    """The runs of packets that the clip needs. Raises VideoError for frames beyond the last."""
    check_frames(clip.numbers, len(index.display_order))
    return _runs(index, sorted(index.display_order[number] for number in clip.positions))


def decode_first_frame(
    source: VideoContent, stream: "av.video.stream.VideoStream", index: VideoIndex
) -> tuple["av.VideoFrame", "FrameShape"]:
    """The first displayed frame and its shape.

    stream: of the open source, which is opened again if the index has no packets.

    Raises VideoError if the frame cannot be decoded.
    """
    first: tuple[av.VideoFrame, FrameShape] | None = None
    if index.packets is not None:
        # The keyframe alone, without filling the decoder's reorder buffer: a third of the time.
        alone = index.packets[index.keyframes[0] : index.keyframes[0] + 1]
        first = next(_displayed_frames(stream, alone, replace(index, keyframes=[0])), None)
    if first is None:
        with open_video(source) as (container, again):
            first = next(_displayed_frames(again, stored_packets(container, again), index), None)
    if first is None:
        raise VideoError("holds no frame that can be decoded")
    return first


def decode_all(source: VideoContent, index: VideoIndex, *, convert: bool) -> int:
    """Decode the whole video with all checks of `decode_frames`; returns the number of frames.

    convert: also convert each frame to RGB.

    Raises VideoError if `decode_frames` would raise it for some frame.
    """
    frames = 0
    converter = VideoReformatter()
    for frame, _ in frames_in_order(source, index):
        if convert:
            to_rgb(converter, frame)
        frames += 1
    return frames


def frames_in_order(
    source: VideoContent, index: VideoIndex, *, threads: bool = False
) -> Iterator[tuple["av.VideoFrame", "FrameShape"]]:
    """All frames of the video in display order: the k-th has number k.

    threads: decode on all cores, if the video starts with a frame that needs no other.

    Raises VideoError if `decode_frames` would raise it for a frame.
    """
    before: FrameShape | None = None
    with open_video(source) as (container, stream):
        displayed = _displayed_frames(stream, stored_packets(container, stream), index, threads=threads)
        for number, (frame, shape) in enumerate(displayed):
            if frame.is_corrupt:
                raise VideoError(f"is damaged in frame {number} of {len(index.display_order)}")
            _check_same(frame, shape, before, number)
            before = shape
            yield frame, shape


@dataclass(frozen=True, slots=True)
class FrameShape:
    """What all frames of a video must have in common."""

    height: int
    """Coded height in pixels."""
    width: int
    """Coded width in pixels."""
    orientation: Orientation
    """How coded frames are rotated and mirrored for display."""

    @property
    def display_size(self) -> tuple[int, int]:
        """(height, width) as displayed."""
        return self.orientation.display_size(self.height, self.width)


def _check_same(frame: "av.VideoFrame", shape: FrameShape, before: FrameShape | None, number: int) -> None:
    """Raises VideoError if the shape differs from that of the previous frame, or the colours cannot be
    converted."""
    check_colorspace(int(frame.colorspace))
    if before is None or shape == before:
        return
    (height, width), (now_height, now_width) = before.display_size, shape.display_size
    if before.display_size != shape.display_size:
        change = f"from frames of {width}x{height} to {now_width}x{now_height}"
    else:
        change = "the rotation of its frames"
    raise VideoError(f"changes {change} at or before frame {number}: re-encode it with one size")


class _Clip:
    """The buffer for the requested frames.

    numbers: of the requested frames.
    positions: frame number → its positions in `pixels`; a number is removed when its positions are filled.
    pixels: T H W 3, allocated with the first frame.
    """

    pixels: NDArray[np.uint8]

    def __init__(
        self,
        indices: NDArray[np.integer],
        roi: Roi | None = None,
        size: tuple[int, int] | None = None,
        max_short_side: int | None = None,
    ) -> None:
        self.numbers = indices
        self.positions: dict[int, list[int]] = {}
        for position, number in enumerate(indices.tolist()):
            self.positions.setdefault(number, []).append(position)
        self._length = len(indices)
        self._roi = roi
        self._size = size
        self._max_short_side = max_short_side
        self._shape: FrameShape | None = None
        # One converter for all frames: its setup costs more than a small frame.
        self._converter = VideoReformatter()

    def store(self, number: int, frame: "av.VideoFrame", shape: FrameShape) -> None:
        """Convert frame `number` and copy it to its positions."""
        _check_same(frame, shape, self._shape, number)
        if self._shape is None:
            self._allocate(shape)
        picture = displayed_rgb(self._converter, frame, shape, self._max_short_side)
        for position in self.positions.pop(number):
            top, left, bottom, right = self._roi or (0, 0, *picture.shape[:2])
            self.pixels[position] = picture[top:bottom, left:right]

    def _allocate(self, shape: FrameShape) -> None:
        check_size(shape, self._size)
        height, width = scaled_size(*shape.display_size, self._max_short_side)
        top, left, bottom, right = self._roi or (0, 0, height, width)
        if not (0 <= top < bottom <= height and 0 <= left < right <= width):
            raise ValueError(f"ROI {self._roi} is not inside frames of {width}x{height}")
        self._shape = shape
        self.pixels = np.empty((self._length, bottom - top, right - left, 3), np.uint8)


def to_rgb(converter: VideoReformatter, frame: "av.VideoFrame") -> NDArray[np.uint8]:
    """The frame as full-range RGB, (H, W, 3), by its tagged colour space and range."""
    return np.asarray(converter.reformat(frame, format="rgb24", threads=1).to_ndarray(), np.uint8)


def displayed_rgb(
    converter: VideoReformatter, frame: "av.VideoFrame", shape: FrameShape, max_short_side: int | None
) -> NDArray[np.uint8]:
    """The frame as displayed, as `to_rgb`; its short side is scaled down to `max_short_side` if it is
    longer."""
    height, width = shape.orientation.display_size(*scaled_size(*shape.display_size, max_short_side))
    if (height, width) == (shape.height, shape.width):
        return shape.orientation.apply(to_rgb(converter, frame))
    scaled = converter.reformat(
        frame, width, height, format="rgb24", interpolation=Interpolation.AREA, threads=1
    )
    return shape.orientation.apply(np.asarray(scaled.to_ndarray(), np.uint8))


def check_size(shape: FrameShape, expected: tuple[int, int] | None) -> None:
    """Raises VideoError if frames do not have the (height, width) in the manifest."""
    if expected is None or shape.display_size == tuple(expected):
        return
    if tuple(expected) == (shape.height, shape.width):
        raise _other_size(
            shape.display_size, expected, "the manifest ignores the file's rotation, as earlier versions did"
        )
    check_picture_size(shape.display_size, expected)


def check_picture_size(size: tuple[int, ...], expected: tuple[int, int]) -> None:
    """Raises VideoError if a picture of this (height, width) does not have that in the manifest."""
    if size != tuple(expected):
        raise _other_size(size, expected, "the file was changed")


def _other_size(size: tuple[int, ...], expected: tuple[int, int], why: str) -> VideoError:
    height, width = size
    return VideoError(
        f"has frames of {width}x{height}, but the manifest has {expected[1]}x{expected[0]} ({why}): make a "
        "new manifest"
    )


def check_frames(indices: NDArray[np.integer], frames: int) -> None:
    """Raises VideoError if one of `indices` is beyond the last of `frames` frames."""
    last = int(np.max(indices))
    if last >= frames:
        raise VideoError(f"has {frames} frames, but frame {last} was requested")


def _runs(index: VideoIndex, needed: list[int]) -> list[tuple[int, int]]:
    """The runs of packets to decode for the `needed` packets, as (first, last), ascending."""
    if not index.ordered:
        return [(index.keyframes[0], len(index.times) - 1)]
    runs: list[tuple[int, int]] = []
    for last in needed:
        position = bisect_right(index.keyframes, last) - 1
        # A packet stored after a keyframe but displayed before it may depend on packets before the keyframe.
        while position > 0 and not _precedes(index.times[index.keyframes[position]], index.times[last]):
            position -= 1
        first = index.keyframes[position]
        while runs and first <= runs[-1][1]:
            first = min(first, runs.pop()[0])
        runs.append((first, last))
    return runs


def _precedes(time: int | None, other: int | None) -> bool:
    """Whether both are known, and the first is not later."""
    return time is not None and other is not None and time <= other


def _fill_from(source: VideoContent, clip: _Clip, index: VideoIndex, runs: list[tuple[int, int]]) -> bool:
    """`_fill` with packets demuxed again from the source."""
    with open_video(source) as (container, stream):
        return _fill(clip, stream, _split(stored_packets(container, stream), runs), index, runs)


def _split(packets: Iterable["av.Packet"], runs: list[tuple[int, int]]) -> Iterator[Iterator["av.Packet"]]:
    """The packets of each run, of all packets of a stream."""
    remaining, begin = iter(packets), 0
    for first, last in runs:
        yield islice(remaining, first - begin, last + 1 - begin)
        begin = last + 1


def _fill(
    clip: _Clip,
    stream: "av.video.stream.VideoStream",
    packets: Iterable[Iterator["av.Packet"]],
    index: VideoIndex,
    runs: list[tuple[int, int]],
) -> bool:
    """Decode the runs and store the wanted frames; stops early where the container's keyframe marks are
    wrong.

    packets: those of each run.

    Returns False if frames are not output in the order of their times; then no stored frame is valid.
    """
    codec = StreamDecoder(stream)
    numbers = {index.times[index.display_order[number]]: number for number in clip.positions}
    needed = {index.display_order[number] for number in clip.positions} if index.ordered else set()
    for (first, _), stored in zip(runs, packets, strict=False):
        start = index.times[first] if index.ordered else None
        latest: int | None = None
        run = enumerate(stored, first)
        for count, frame in enumerate(_frames(codec, run, start, needed, index)):
            time = frame.pts
            if index.ordered and (time is None or (latest is not None and time <= latest)):
                return False
            latest = time
            if start is not None and time is not None:
                if time < start:
                    continue  # its references may be missing, and it is not wanted
                if time == start and first > index.keyframes[0] and not codec.is_intra(frame):
                    return True
            if frame.is_corrupt:
                raise VideoError(f"is damaged at or before frame {_position(index, time, count)}")
            number = numbers.get(time) if index.ordered else count
            if number in clip.positions:
                clip.store(number, frame, _shape_of(frame, codec))
            if not clip.positions:
                return True
    return True


def _displayed_frames(
    stream: "av.video.stream.VideoStream",
    packets: Iterable["av.Packet"],
    index: VideoIndex,
    *,
    threads: bool = False,
) -> Iterator[tuple["av.VideoFrame", FrameShape]]:
    """All displayed frames in the decoder's output order. packets: all of the stream."""
    # With threads, errors are raised some packets late, so that of a frame that is not displayed would be
    # attributed to another frame.
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
    """The decoder's output for a run of packets, without the frames that it can skip.

    start: the time of the run's keyframe. needed: packets whose frames are wanted; if empty, all frames are.
    """
    # A frame of two fields may have two packets, of which the index lists only one.
    can_skip = bool(needed) and codec.name in SKIPPABLE and codec.field_order in (FIELDS_UNKNOWN, PROGRESSIVE)
    skipping = False
    for ordinal, packet in run:
        if can_skip and skipping != (ordinal not in needed):
            skipping = not skipping
            codec.skip_unreferenced(skipping)
        try:
            yield from codec.decode(packet)
        except av.FFmpegError as error:
            if start is not None and packet.pts is not None and packet.pts < start:
                continue  # its references are missing
            number = _position(index, packet.pts, ordinal)
            raise VideoError(f"is damaged at or before frame {number}: {ffmpeg_message(error)}") from error
    yield from codec.decode(None)
    codec.reset()


def _shape_of(frame: "av.VideoFrame", codec: StreamDecoder) -> FrameShape:
    return FrameShape(frame.height, frame.width, codec.orientation(frame))


def _position(index: VideoIndex, time: int | None, count: int) -> str:
    """The number of the frame at `time`, by the times or else by the count, for messages."""
    number = count
    if index.ordered and time is not None:
        number = sum(_precedes(index.times[packet], time - 1) for packet in index.display_order)
    return f"{number} of {len(index.display_order)}"
