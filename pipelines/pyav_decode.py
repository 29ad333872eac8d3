"""Frame-exact decoding with PyAV: any codec FFmpeg knows, only the packets that are needed.

Frame numbers count frames in the order they are shown. A file is demuxed once, without decoding; the decoder
is then fed from the keyframe that a wanted frame builds on up to that frame, and nothing else. It never
seeks: what a container makes of a time (AVI and MPEG streams: not much) does not matter. This gives the same
pixels as decoding everything, and where the container does not tell enough, everything is decoded.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from . import VideoDefect
from .container import VideoIndex, decoder_of, in_words, open_video, read_index, stored_packets

KEPT_BYTES = 64 * 2**20  # of packets in memory; a video with more is demuxed a second time

# Codecs whose frames say by themselves that nothing refers to them, so that leaving one out changes no other.
# Not so HEVC (frames of a higher temporal layer may refer to it), VP8 and VP9 (their motion vectors,
# probabilities and segments may be reused); AV1's decoder takes the setting at its start only.
SKIPPABLE = frozenset({"h264", "mpeg2video", "mpeg4"})

FIELDS_UNKNOWN, PROGRESSIVE = 0, 1  # <libavcodec/defs.h>, AVFieldOrder

Window = tuple[int, int, int, int]


def decode_frames(
    source: Path | bytes,
    indices: NDArray[np.integer],
    window: Window | None = None,
    *,
    size: tuple[int, int] | None = None,
) -> NDArray[np.uint8]:
    """The frames at `indices`, any order, repeats allowed, as RGB of shape (T, H, W, 3).

    Args:
        source: a file, or its content.
        window: (top, left, bottom, right) in pixels; only this part of the frames is returned.
        size: (height, width) in pixels that the frames must have.

    Raises:
        VideoDefect: the file cannot be opened, has frames of another size or fewer than asked for, or is
            found damaged in what has to be decoded.
    """
    with open_video(source) as (container, stream):
        index = read_index(container, stream, keep_bytes=KEPT_BYTES)
        clip = _new_clip(stream, index, indices, window, size)
        needed = sorted(index.shown[number] for number in clip.places)
        runs = _runs(index, needed)
        if index.packets is not None:
            _fill(clip, stream, index.packets, index, runs)
    if index.packets is None:
        with open_video(source) as (container, stream):
            _fill(clip, stream, stored_packets(container, stream), index, runs)
    if clip.places and runs != (whole := [(index.keyframes[0], len(index.times) - 1)]):
        # What the container calls a keyframe is none (H.264 that refreshes the picture piece by piece).
        with open_video(source) as (container, stream):
            _fill(clip, stream, stored_packets(container, stream), index, whole)
    if clip.places:
        raise VideoDefect(f"breaks at or before frame {min(clip.places)} of {len(index.shown)}")
    return clip.pixels


@dataclass
class _Clip:
    """The frames to be returned, and where each of them goes.

    size: (height, width) of whole frames. places: frame number → its places in `pixels`, emptied as they are
    filled.
    """

    pixels: NDArray[np.uint8]  # T H W 3
    window: Window
    size: tuple[int, int]
    places: dict[int, list[int]]
    # One converter for all frames: setting it up costs more than a small frame.
    converter: VideoReformatter = field(default_factory=VideoReformatter)

    def take(self, number: int, frame: "av.VideoFrame") -> None:
        """Fill the places of frame `number`."""
        if (frame.height, frame.width) != self.size:
            height, width = self.size
            raise VideoDefect(
                f"changes from frames of {width}x{height} to {frame.width}x{frame.height} "
                f"at or before frame {number}: encode it anew in one size"
            )
        picture = to_rgb(self.converter, frame)
        top, left, bottom, right = self.window
        for place in self.places.pop(number):
            self.pixels[place] = picture[top:bottom, left:right]


def to_rgb(converter: VideoReformatter, frame: "av.VideoFrame") -> NDArray[np.uint8]:
    """The frame as full-range RGB, (H, W, 3), by the colour space and range it is tagged with."""
    return np.asarray(converter.reformat(frame, format="rgb24", threads=1).to_ndarray(), np.uint8)


def _new_clip(
    stream: "av.video.stream.VideoStream",
    index: VideoIndex,
    indices: NDArray[np.integer],
    window: Window | None,
    size: tuple[int, int] | None,
) -> _Clip:
    """Room for the wanted frames, if the file can be expected to have them."""
    check_size((stream.height, stream.width), size)
    check_frames(indices, len(index.shown))
    height, width = stream.height, stream.width
    top, left, bottom, right = window or (0, 0, height, width)
    if not (0 <= top < bottom <= height and 0 <= left < right <= width):
        raise ValueError(f"window {window} does not lie in frames of {width}x{height}")
    places: dict[int, list[int]] = {}
    for place, number in enumerate(indices.tolist()):
        places.setdefault(number, []).append(place)
    pixels = np.empty((len(indices), bottom - top, right - left, 3), np.uint8)
    return _Clip(pixels, (top, left, bottom, right), (height, width), places)


def check_size(found: tuple[int, int], expected: tuple[int, int] | None) -> None:
    """Raise VideoDefect where frames are not of the (height, width) that the manifest says."""
    if expected is not None and found != tuple(expected):
        raise VideoDefect(
            f"has frames of {found[1]}x{found[0]}, the manifest says {expected[1]}x{expected[0]}; "
            "the file changed since: make the manifest anew"
        )


def check_frames(indices: NDArray[np.integer], frames: int) -> None:
    """Raise VideoDefect where one of `indices` lies beyond the last of `frames` frames."""
    last = int(indices.max())
    if last >= frames:
        raise VideoDefect(f"holds {frames} frames, frame {last} was asked for")


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


def _fill(
    clip: _Clip,
    stream: "av.video.stream.VideoStream",
    packets: Iterable["av.Packet"],
    index: VideoIndex,
    runs: list[tuple[int, int]],
) -> None:
    """Decode the runs and take the wanted frames; leaves at the first sign that the container does not tell
    the truth about times or keyframes, with the places it could not fill.

    packets: all of the stream, as the index numbers them.
    """
    codec = decoder_of(stream)
    shown = {index.times[index.shown[number]]: number for number in clip.places}
    needed = {index.shown[number] for number in clip.places} if index.ordered else set()
    remaining, position = iter(packets), 0
    for first, last in runs:
        start = index.times[first] if index.ordered else None
        latest: int | None = None
        run = enumerate(islice(remaining, first - position, last + 1 - position), first)
        for count, frame in enumerate(_frames(codec, run, start, needed, index)):
            time = frame.pts
            if index.ordered and (time is None or (latest is not None and time <= latest)):
                return  # not the order that the times promise
            latest = time
            if start is not None and time is not None:
                if time < start:
                    continue  # may lack what it builds on, and is not wanted
                if time == start and first > index.keyframes[0] and not _stands_alone(frame):
                    return
            if frame.is_corrupt:
                raise VideoDefect(f"is damaged at or before frame {_place(index, time, count)}")
            number = shown.get(time) if index.ordered else count
            if number in clip.places:
                clip.take(number, frame)
            if not clip.places:
                return
        position = last + 1


def _frames(
    codec: "av.video.codeccontext.VideoCodecContext",
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
            codec.skip_frame = "NONREF" if spared else "DEFAULT"
        try:
            yield from codec.decode(packet)
        except av.FFmpegError as error:
            if start is not None and packet.pts is not None and packet.pts < start:
                continue  # lacks what it builds on
            number = _place(index, packet.pts, ordinal)
            raise VideoDefect(f"is damaged at or before frame {number}: {in_words(error)}") from error
    yield from codec.decode(None)
    codec.flush_buffers()


def _stands_alone(frame: "av.VideoFrame") -> bool:
    """Whether a frame that the container calls a keyframe is coded without others."""
    kind = frame.pict_type
    return kind == PictureType.I or (kind == PictureType.NONE and bool(frame.key_frame))


def _place(index: VideoIndex, time: int | None, count: int) -> str:
    """Where in the video: the number of the frame shown at `time`, by the times or by the count."""
    number = count
    if index.ordered and time is not None:
        number = sum(_precedes(index.times[packet], time - 1) for packet in index.shown)
    return f"{number} of {len(index.shown)}"
