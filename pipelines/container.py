"""Opening a video file with PyAV, and finding its frames without decoding them."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av

from . import VideoDefect

# FFmpeg hides damage: it repeats what it has. Most of its decoders say so of the frame; these have to be
# told. The others stay lenient, as their strict mode refuses streams that every player shows well.
STRICT = frozenset({"hevc", "mjpeg"})

# What MPEG-4 encoders write into streams with two frames in a packet and an empty one after it. Then the
# times are those of the packets, not of the frames.
PACKED = re.compile(rb"DivX\d+(?:b|Build)\d+p")

VP8_SHOWN = 0x10  # bit of a VP8 frame's first byte (RFC 6386, 9.1)


@dataclass(frozen=True, slots=True)
class VideoIndex:
    """The packets of a video stream, numbered in the order they are stored and decoded.

    A frame is what decoding from the first keyframe to the end shows, from the time of that keyframe on. So
    there is none for: packets before the first keyframe, and those stored after it but shown before it (in a
    video cut from a longer one they lack what they build on: decoders leave them out, or show them broken);
    packets that an edit list leaves out (they are decoded all the same, others refer to them); hidden
    reference frames of VP8. Negative times mean nothing special.
    """

    times: list[int | None]
    """Presentation time of each packet, in units of the stream."""
    keyframes: list[int]
    """Packets at which decoding can start, ascending."""
    shown: list[int]
    """The packet of each frame, in the order they are shown."""
    ordered: bool
    """Whether the times say in which order frames are shown: each shown packet has a time of its own."""
    packets: list["av.Packet"] | None
    """The packets themselves, where they were to be kept and are not too large."""

    @property
    def start(self) -> int | None:
        """The time of the first keyframe, before which nothing is shown; None where times say nothing."""
        return self.times[self.keyframes[0]] if self.ordered else None


@contextmanager
def open_video(
    source: Path | bytes,
) -> Iterator[tuple["av.container.InputContainer", "av.video.stream.VideoStream"]]:
    """The open container and its first video stream; whatever FFmpeg says inside becomes a VideoDefect.

    Raises VideoDefect for a file that is missing, empty, no video, or found damaged while it is used.
    """
    if isinstance(source, Path):
        try:
            size = source.stat().st_size
        except OSError as error:
            raise VideoDefect(f"cannot be read: {error.strerror}") from error
    else:
        size = len(source)
    if size == 0:
        raise VideoDefect("is empty (0 bytes)")
    try:
        # Text in a file's tags may be in any encoding; nobody reads it here.
        with av.open(
            io.BytesIO(source) if isinstance(source, bytes) else str(source), metadata_errors="ignore"
        ) as container:
            if not container.streams.video:
                raise VideoDefect("holds no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise VideoDefect("holds a video stream of a codec that FFmpeg does not know")
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise VideoDefect(f"is not a video, or is damaged: {in_words(error)}") from error


def read_index(
    container: "av.container.InputContainer", stream: "av.video.stream.VideoStream", *, keep_bytes: int = 0
) -> VideoIndex:
    """Demux the stream to its end, without decoding.

    keep_bytes: packets are kept in the index as long as they are no larger together.
    """
    times: list[int | None] = []
    keyframes: list[int] = []
    shown: list[int] = []
    packets: list[av.Packet] = []
    mpeg4 = stream.codec_context.name == "mpeg4"
    vp8 = stream.codec_context.name == "vp8"
    packed = False
    room = keep_bytes
    for ordinal, packet in enumerate(stored_packets(container, stream)):
        times.append(packet.pts)
        if packet.is_keyframe:
            if mpeg4 and not keyframes:
                packed = PACKED.search((stream.codec_context.extradata or b"") + bytes(packet)) is not None
            keyframes.append(ordinal)
        hidden = packet.is_discard or (vp8 and not memoryview(packet)[0] & VP8_SHOWN)
        if keyframes and not hidden:
            shown.append(ordinal)
        if room >= 0:
            room -= packet.size
            packets.append(packet)
            if room < 0:
                packets.clear()
    if not shown:
        raise VideoDefect("holds no frame" if keyframes else "holds no keyframe")
    known = [time for ordinal in shown if (time := times[ordinal]) is not None]
    ordered = len(set(known)) == len(shown) and not packed
    if ordered:
        shown = [ordinal for _, ordinal in sorted(zip(known, shown, strict=True))]
        if keyframes[0] in shown:
            shown = shown[shown.index(keyframes[0]) :]
    return VideoIndex(times, keyframes, shown, ordered, packets if room >= 0 else None)


def stored_packets(
    container: "av.container.InputContainer", stream: "av.video.stream.VideoStream"
) -> Iterator["av.Packet"]:
    """The packets that `VideoIndex` numbers: all but those without content, which no decoder takes."""
    return (packet for packet in container.demux(stream) if packet.size)


def decoder_of(stream: "av.video.stream.VideoStream") -> "av.video.codeccontext.VideoCodecContext":
    """The stream's decoder, set to one thread and to telling of damage where it can.

    Damage then shows itself by an av.FFmpegError, or by `is_corrupt` of a frame.
    """
    codec = stream.codec_context
    codec.thread_type = "NONE"  # parallelism is over clips; frame threads would add copies and delay
    if codec.name in STRICT:
        codec.options = {"err_detect": "explode"}
    return codec


def in_words(error: Exception) -> str:
    """FFmpeg's words without the error number before them and the file name after them."""
    return getattr(error, "strerror", None) or str(error)
