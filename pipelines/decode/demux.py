"""Opens video files with PyAV, and indexes their frames without decoding."""

import heapq
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import av
from av.stream import Disposition

from pipelines.decode.broken_files import diagnose_file
from pipelines.decode.picture_headers import SCANNED, PictureScan
from pipelines.decode.video_file import OpenFile, VideoContent, open_content
from pipelines.errors import VideoError

# Written by MPEG-4 encoders that put two frames into one packet and an empty packet after it. The times in
# such a stream are those of the packets, not of the frames.
PACKED = re.compile(rb"DivX\d+(?:b|Build)\d+p")

FIELDS_UNKNOWN, PROGRESSIVE = 0, 1  # <libavcodec/defs.h>, AVFieldOrder

# Video streams of pictures: cover art and thumbnails, in any codec.
NOT_VIDEOS = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image

# FFmpeg's names of formats that only list other files.
PLAYLISTS = frozenset({"concat", "hls", "dash", "imf"})

# Playlists and session descriptions name other files and hosts, so the author of a video could make FFmpeg
# read any of them. FFmpeg reads from a Python file object here and needs no protocol.
NO_PROTOCOLS = {"protocol_whitelist": "none"}

# Text in a file's tags may have any encoding; it is not used here. PyAV 19 is lenient by default.
LENIENT_TAGS: dict[str, Any] = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}

HEADER_BYTES = 4096  # of a packet, which contain the headers of its picture

# FFmpeg treats a packet of MPEG-4 of up to so many bytes as a picture that is not coded, such as the one
# after a packet with two pictures.
MPEG4_NOT_CODED = 19

VP8_SHOWN = 0x10  # bit of a VP8 frame's first byte (RFC 6386, 9.1)


class NoVideoFound(VideoError):
    """FFmpeg opens the file but finds no video, possibly because the file is truncated."""


@dataclass(frozen=True, slots=True)
class VideoIndex:
    """The packets of a video stream, numbered in the order they are stored and decoded.

    The frames are what a player displays when it decodes from the first keyframe to the end, from the time
    of that keyframe on. The following packets have no frame: those before the first keyframe; those stored
    after it but displayed before it (their references are missing in a video cut from a longer one, so
    decoders drop them or display them broken); those that an edit list removes (they are decoded, as others
    refer to them); hidden reference frames of VP8. Negative times have no special meaning.
    """

    times: list[int | None]
    """Presentation time of each packet, in units of the stream."""
    keyframes: list[int]
    """Packets at which decoding can start, ascending; at least one."""
    display_order: list[int]
    """The packet of each frame in display order. If `ordered` is false, the order is meaningless and there
    may be fewer frames: those that the decoder outputs."""
    ordered: bool
    """Whether the times define the display order. Many containers have decoding times instead, all distinct
    and rising; then only the decoder's output order counts."""
    packets: list["av.Packet"] | None
    """The packets themselves, if `read_index` kept them."""
    gaps: bool = False
    """Whether FFmpeg marks a packet as incomplete: a transport stream lost parts, or several streams were
    concatenated."""

    @property
    def start(self) -> int | None:
        """The time of the first keyframe, before which nothing is displayed; None if not `ordered`."""
        return self.times[self.keyframes[0]] if self.ordered else None

    @property
    def starts_clean(self) -> bool:
        """Whether decoding starts with the first packet and nothing is displayed before it."""
        start = self.start
        return self.keyframes[0] == 0 and all(
            time is not None and start is not None and time >= start for time in self.times
        )

    @property
    def keyframe_distance(self) -> int:
        """The largest number of packets from a keyframe to the next one or to the end."""
        following = [*self.keyframes[1:], len(self.times)]
        return max(after - before for before, after in zip(self.keyframes, following, strict=True))


@contextmanager
def open_video(
    source: VideoContent,
) -> Iterator[tuple["av.container.InputContainer", "av.video.stream.VideoStream"]]:
    """The open container and its default video stream that is not cover art.

    Raises VideoError for a file that is missing, empty or no video, and for every error of FFmpeg inside
    the context.
    """
    with open_content(source) as file, open_container(file) as opened:
        yield opened


@contextmanager
def open_container(
    file: OpenFile,
) -> Iterator[tuple["av.container.InputContainer", "av.video.stream.VideoStream"]]:
    """`open_video` for an open file, which stays open. Reads it from the beginning."""
    file.seek(0)
    if not file.read(1):
        raise VideoError("is empty (0 bytes)")
    file.seek(0)
    try:
        with av.open(file, container_options=NO_PROTOCOLS, **LENIENT_TAGS) as container:
            if container.format.name in PLAYLISTS:
                raise VideoError(f"is a list of other files ({container.format.name}), not a video")
            yield container, _video_stream(container)
    except NoVideoFound as defect:
        raise VideoError(diagnose_file(file) or str(defect)) from defect
    except (av.FFmpegError, OSError) as error:
        raise VideoError(_open_error(file, error)) from error


def header_size(data: bytes, stream: int) -> tuple[int, int]:
    """(height, width) in the container's header of stream number `stream`; its frames may differ.

    Raises VideoError as `open_video` does.
    """
    # If FFmpeg may use the codec, it reads the first frames and reports their size.
    options = {**NO_PROTOCOLS, "codec_whitelist": "none"}
    try:
        with av.open(BytesIO(data), container_options=options, **LENIENT_TAGS) as container:
            codec = container.streams[stream].codec_context
            return codec.height, codec.width
    except (av.FFmpegError, OSError) as error:
        raise VideoError(_open_error(BytesIO(data), error)) from error


def _open_error(file: OpenFile, error: Exception) -> str:
    """The message for a file that cannot be read as a video."""
    return diagnose_file(file) or f"is not a video, or is damaged: {ffmpeg_message(error)}"


def _video_stream(container: "av.container.InputContainer") -> "av.video.stream.VideoStream":
    """The default video stream that is not a picture; raises NoVideoFound if there is none."""
    streams = container.streams.video
    videos = [stream for stream in streams if not stream.disposition & NOT_VIDEOS]
    if not videos:
        raise NoVideoFound("holds cover art, but no video" if streams else "holds no video stream")
    default = [stream for stream in videos if stream.disposition & Disposition.default] or videos
    best = container.streams.best("video")
    chosen = best if best in default else default[0]
    if chosen.codec_context is None:
        raise NoVideoFound("holds a video stream of a codec that FFmpeg does not know")
    return chosen


def read_index(
    container: "av.container.InputContainer", stream: "av.video.stream.VideoStream", *, keep_bytes: int = 0
) -> VideoIndex:
    """Demux the stream to its end, without decoding.

    keep_bytes: the index keeps the packets if their total size is at most this.
    """
    times: list[int | None] = []
    keyframes: list[int] = []
    display_order: list[int] = []
    packets: list[av.Packet] = []
    codec = stream.codec_context
    mpeg4 = codec.name == "mpeg4"
    vp8 = codec.name == "vp8"
    packed = gaps = False
    scan = PictureScan(codec.name, codec.extradata or b"") if codec.name in SCANNED else None
    rising, latest = True, -sys.maxsize
    scans = scan is not None  # scanning costs time for each packet, so it ends when it cannot matter any more
    bytes_left = keep_bytes
    for ordinal, packet in enumerate(stored_packets(container, stream)):
        time = packet.pts
        times.append(time)
        if packet.is_corrupt:
            gaps = True
        if packet.is_keyframe:
            if mpeg4 and not keyframes:
                packed = packed or PACKED.search((codec.extradata or b"") + bytes(packet)) is not None
            keyframes.append(ordinal)
        hidden = packet.is_discard
        if scans:
            assert scan is not None
            # If the stored times do not rise, frames are reordered, and B-pictures need not be searched for.
            rising = rising and time is not None and time > latest
            latest = latest if time is None else time
            if scan.b_pictures or not rising:
                scans = scan.may_have_fields or scan.may_lack_references
            if scans:
                hidden = not scan.add(bytes(memoryview(packet)[:HEADER_BYTES])) or hidden
        if mpeg4:
            packed = packed or packet.size <= MPEG4_NOT_CODED
        elif vp8:
            hidden = hidden or not memoryview(packet)[0] & VP8_SHOWN
        if keyframes and not hidden:
            display_order.append(ordinal)
        if bytes_left >= 0:
            bytes_left -= packet.size
            packets.append(packet)
            if bytes_left < 0:
                packets.clear()
    if not times:
        raise NoVideoFound("holds no frame")
    kept = packets if bytes_left >= 0 else None
    if not keyframes:  # some containers do not mark them
        return VideoIndex(times, [0], list(range(len(times))), False, kept, gaps)
    if not display_order:
        raise NoVideoFound("holds no frame")
    by_time = None if packed or (scan and scan.field_pictures) else _by_time(times, display_order)
    if by_time is not None:
        reorders = codec.has_b_frames if scan is None else scan.b_pictures
        # If the decoder reorders frames, rising times are decoding times.
        in_stored_order = (time for ordinal in display_order if (time := times[ordinal]) is not None)
        if not reorders if by_time == display_order else _can_reorder(in_stored_order, codec.reorder_depth):
            first = keyframes[0]
            display_order = by_time[by_time.index(first) :] if first in by_time else by_time
            return VideoIndex(times, keyframes, display_order, True, kept, gaps)
    return VideoIndex(times, keyframes, display_order, False, kept, gaps)


def _by_time(times: list[int | None], ordinals: list[int]) -> list[int] | None:
    """The packets `ordinals` sorted by time; None if times are missing or not distinct."""
    known = [time for ordinal in ordinals if (time := times[ordinal]) is not None]
    if len(set(known)) != len(ordinals):
        return None
    return [ordinal for _, ordinal in sorted(zip(known, ordinals, strict=True))]


def _can_reorder(times: Iterable[int], depth: int) -> bool:
    """Whether a decoder with a reorder buffer of `depth` frames could display these stored times in order.

    It cannot if the clock was set back between two recordings: all frames of the first would be overtaken.
    """
    latest: list[int] = []  # heap of the depth + 1 latest times so far
    for time in times:
        if len(latest) <= depth:
            heapq.heappush(latest, time)
        elif latest[0] > time:
            return False
        else:
            heapq.heapreplace(latest, time)
    return True


def stored_packets(
    container: "av.container.InputContainer", stream: "av.video.stream.VideoStream"
) -> Iterator["av.Packet"]:
    """The packets that `VideoIndex` numbers: all with content, as decoders accept no empty ones."""
    packets = container.demux(stream)
    # After the last packet, PyAV 18 searches a transport stream for streams that began later, and may raise
    # IndexError, depending on the content of uninitialised memory.
    with suppress(IndexError):
        for packet in packets:
            if packet.size:
                yield packet


def ffmpeg_message(error: Exception) -> str:
    """FFmpeg's message without the error number and the file name."""
    return getattr(error, "strerror", None) or str(error)
