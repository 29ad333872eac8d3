"""Opening a video file with PyAV, and finding its frames without decoding them."""

import heapq
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import av
from av.stream import Disposition

from pipelines.decode.broken_files import diagnose_file
from pipelines.decode.picture_headers import SCANNED, PictureScan
from pipelines.decode.video_file import VideoFile
from pipelines.errors import VideoError

# What MPEG-4 encoders write into streams with two frames in a packet and an empty one after it. Then the
# times are those of the packets, not of the frames.
PACKED = re.compile(rb"DivX\d+(?:b|Build)\d+p")

FIELDS_UNKNOWN, PROGRESSIVE = 0, 1  # <libavcodec/defs.h>, AVFieldOrder

# Streams that are not videos: cover art and thumbnails, whatever codec they are in.
NOT_VIDEOS = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image

# FFmpeg's names of formats that only name other files.
PLAYLISTS = frozenset({"concat", "hls", "dash", "imf"})

# A playlist, a session description and the like name other files and hosts; whoever can write a video could
# have any of them read. What FFmpeg reads is handed to it, so it needs no protocol at all.
NO_PROTOCOLS = {"protocol_whitelist": "none"}

# Text in a file's tags may be in any encoding; nobody reads it here. PyAV 19 is lenient by itself.
LENIENT_TAGS: dict[str, Any] = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}

HEADER_BYTES = 4096  # of a packet in which the headers of its picture lie

# FFmpeg takes a packet of MPEG-4 up to so many bytes for a picture that is not coded, as it stands behind a
# packet that holds two.
MPEG4_NOT_CODED = 19

VP8_SHOWN = 0x10  # bit of a VP8 frame's first byte (RFC 6386, 9.1)


class NoVideoFound(VideoError):
    """A file that FFmpeg opens, and in which it finds no video: it may be cut off before that."""


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
    """Packets at which decoding can start, ascending; at least one."""
    display_order: list[int]
    """The packet of each frame, in the order they are shown. Where `ordered` is false the order means
    nothing, and there may be fewer frames: those that the decoder gives out."""
    ordered: bool
    """Whether the times say in which order frames are shown. Many containers hold decoding times in their
    place, all different and rising; then only the decoder's order of output counts."""
    packets: list["av.Packet"] | None
    """The packets themselves, where they were to be kept and are not too large."""
    gaps: bool = False
    """Whether FFmpeg says of a packet that it is not whole. In a transport stream, parts were lost,
    or several streams were made one."""

    @property
    def start(self) -> int | None:
        """The time of the first keyframe, before which nothing is shown; None where times say nothing."""
        return self.times[self.keyframes[0]] if self.ordered else None

    @property
    def starts_clean(self) -> bool:
        """Whether decoding starts with the first packet, and nothing is shown before it."""
        start = self.start
        return self.keyframes[0] == 0 and all(
            time is not None and start is not None and time >= start for time in self.times
        )

    @property
    def keyframe_distance(self) -> int:
        """The most packets from one keyframe to the next, or to the end."""
        following = [*self.keyframes[1:], len(self.times)]
        return max(after - before for before, after in zip(self.keyframes, following, strict=True))


@contextmanager
def open_video(
    source: Path | bytes,
) -> Iterator[tuple["av.container.InputContainer", "av.video.stream.VideoStream"]]:
    """The open container and its video stream; whatever FFmpeg says inside becomes a VideoError.

    Of several video streams it is the default one. Cover art is none.

    Raises VideoError for a file that is missing, empty, no video, or found damaged while it is used.
    """
    with ExitStack() as stack:
        file = stack.enter_context(VideoFile(source)) if isinstance(source, Path) else BytesIO(source)
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
            raise VideoError(_complaint(file, error)) from error


def header_size(data: bytes, stream: int) -> tuple[int, int]:
    """(height, width) of a stream, by its number, as the container's header says, whatever its frames are.

    Raises VideoError as `open_video` does.
    """
    # FFmpeg looks into the first frames, and takes the size of those, where it may use the codec.
    options = {**NO_PROTOCOLS, "codec_whitelist": "none"}
    try:
        with av.open(BytesIO(data), container_options=options, **LENIENT_TAGS) as container:
            codec = container.streams[stream].codec_context
            return codec.height, codec.width
    except (av.FFmpegError, OSError) as error:
        raise VideoError(_complaint(BytesIO(data), error)) from error


def _complaint(file: VideoFile | BytesIO, error: Exception) -> str:
    """Why a file cannot be read as a video."""
    return diagnose_file(file) or f"is not a video, or is damaged: {ffmpeg_message(error)}"


def _video_stream(container: "av.container.InputContainer") -> "av.video.stream.VideoStream":
    """The default one of the video streams that are not pictures; raises NoVideoFound where there is none."""
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

    keep_bytes: packets are kept in the index as long as they are no larger together.
    """
    times: list[int | None] = []
    keyframes: list[int] = []
    shown: list[int] = []
    packets: list[av.Packet] = []
    codec = stream.codec_context
    mpeg4 = codec.name == "mpeg4"
    vp8 = codec.name == "vp8"
    packed = gaps = False
    scan = PictureScan(codec.name, codec.extradata or b"") if codec.name in SCANNED else None
    rising, latest = True, -sys.maxsize
    scans = scan is not None  # this runs for each packet of a video: what cannot matter is not asked for
    room = keep_bytes
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
            # Times that do not rise as stored show that frames are reordered: nothing has to be looked for.
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
            shown.append(ordinal)
        if room >= 0:
            room -= packet.size
            packets.append(packet)
            if room < 0:
                packets.clear()
    if not times:
        raise NoVideoFound("holds no frame")
    kept = packets if room >= 0 else None
    if not keyframes:  # some containers do not mark them
        return VideoIndex(times, [0], list(range(len(times))), False, kept, gaps)
    if not shown:
        raise NoVideoFound("holds no frame")
    by_time = None if packed or (scan and scan.field_pictures) else _by_time(times, shown)
    if by_time is not None:
        reorders = codec.has_b_frames if scan is None else scan.b_pictures
        # Rising times under a decoder that reorders are those of decoding.
        in_stored_order = (time for ordinal in shown if (time := times[ordinal]) is not None)
        if not reorders if by_time == shown else _held_back(in_stored_order, codec.reorder_depth):
            first = keyframes[0]
            shown = by_time[by_time.index(first) :] if first in by_time else by_time
            return VideoIndex(times, keyframes, shown, True, kept, gaps)
    return VideoIndex(times, keyframes, shown, False, kept, gaps)


def _by_time(times: list[int | None], shown: list[int]) -> list[int] | None:
    """The packets of `shown` in the order of their times; None where these are missing or not distinct."""
    known = [time for ordinal in shown if (time := times[ordinal]) is not None]
    if len(set(known)) != len(shown):
        return None
    return [ordinal for _, ordinal in sorted(zip(known, shown, strict=True))]


def _held_back(times: Iterable[int], depth: int) -> bool:
    """Whether a decoder that holds back `depth` frames could show frames at these times, given as stored.

    Not so where the clock was set back between two recordings: then as many frames as the first has would be
    overtaken.
    """
    latest: list[int] = []  # the depth + 1 latest times so far, the earliest of them first
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
    """The packets that `VideoIndex` numbers: all but those without content, which no decoder takes."""
    packets = container.demux(stream)
    # Behind the last packet, PyAV 18 looks for streams that a transport stream began later, and may raise
    # IndexError, depending on what lies in memory.
    with suppress(IndexError):
        for packet in packets:
            if packet.size:
                yield packet


def ffmpeg_message(error: Exception) -> str:
    """FFmpeg's words without the error number before them and the file name after them."""
    return getattr(error, "strerror", None) or str(error)
