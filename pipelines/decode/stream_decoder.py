"""A video stream's decoder, configured to report damage where it can."""

import av
from av.video.frame import PictureType

from pipelines.decode.frame_sizes import vp9_keyframe
from pipelines.decode.orientation import UPRIGHT, Orientation, orientation_of

# FFmpeg conceals damage with earlier pixels. Most decoders mark such frames; these need an option for it.
# The others stay lenient, as their strict mode refuses streams that every player displays correctly. HEVC
# may have a checksum of each picture, which is then compared.
STRICT = {"hevc": "explode+crccheck", "mjpeg": "explode"}

# FFmpeg's own VP9 decoder detects almost no damage; Google's detects truncated frame data and gives the
# same pixels.
VP9 = "libvpx-vp9"
VP9_PIXELS = frozenset({"yuv420p", "yuv444p"})
"""Pixel formats that every build of it decodes."""

_VP9_PICTURE = bytes.fromhex("8249834200007000760038241c194e00002020003b00")
"""A keyframe of 8x8 grey pixels."""


class StreamDecoder:
    """The decoder of a video stream, on one thread or, with `threads`, on all cores.

    Damage raises av.FFmpegError or sets `is_corrupt` of a frame.
    """

    def __init__(self, stream: "av.video.stream.VideoStream", *, threads: bool = False) -> None:
        self._own = stream.codec_context
        self._codec = self._own
        self.name = self._own.name
        self.field_order = self._own.field_order
        self._orientation: Orientation | None = None  # of VP9, read with FFmpeg's own decoder
        self._read: tuple[int, Orientation] | None = None  # rotation and orientation at the last read
        self._keyframes: set[int | None] = set()
        self._reads_vp9 = self.name == "vp9" and self._own.pix_fmt in VP9_PIXELS and _has_libvpx()
        if self._reads_vp9:
            self._codec = av.VideoCodecContext.create(VP9, "r")
            for name in ("extradata", "color_range", "color_primaries", "color_trc", "colorspace"):
                setattr(self._codec, name, getattr(self._own, name))
        for codec in {self._own, self._codec}:
            # Workers decode many clips at once; there, threads would only add copies and delay.
            codec.thread_type = "AUTO" if threads else "NONE"
            if not threads:
                codec.thread_count = 1  # libvpx has threads of its own, and starts one for each core
        if self.name in STRICT:
            self._codec.options = {"err_detect": STRICT[self.name]}

    def skip_unreferenced(self, skip: bool) -> None:
        """Skip, or decode again, frames that no other frame refers to."""
        self._codec.skip_frame = "NONREF" if skip else "DEFAULT"

    def decode(self, packet: "av.Packet | None") -> list["av.VideoFrame"]:
        """The frames that a packet completes; None flushes the delayed ones. Raises av.FFmpegError."""
        if self._reads_vp9 and packet is not None:
            if self._orientation is None:
                self._orientation = self._orientation_by_own()
            if vp9_keyframe(bytes(memoryview(packet)[:4])):
                self._keyframes.add(packet.pts)
        return self._codec.decode(packet)

    def _orientation_by_own(self) -> Orientation:
        """The orientation by FFmpeg's own decoder; the decoder `VP9` does not receive it.

        The container defines it, so any picture has it; a small one saves decoding a keyframe twice.
        """
        packet = av.Packet(len(_VP9_PICTURE))
        packet.update(_VP9_PICTURE)
        frames = [*self._own.decode(packet), *self._own.decode(None)]
        self._own.flush_buffers()
        return orientation_of(frames[0]) if frames else UPRIGHT

    def reset(self) -> None:
        """Clear the decoder's state, to start at another keyframe."""
        self._codec.flush_buffers()

    def orientation(self, frame: "av.VideoFrame") -> Orientation:
        """The orientation of the latest frame.

        The display matrix is read at keyframes and where the rotation changes only, because PyAV keeps each
        frame whose side data was read until Python's cycle collector runs: 250 frames, 780 MB in 1920x1080.
        """
        if self._orientation is not None:
            return self._orientation
        rotation = frame.rotation
        if self._read is None or frame.key_frame or rotation != self._read[0]:
            self._read = rotation, orientation_of(frame)
        return self._read[1]

    def is_intra(self, frame: "av.VideoFrame") -> bool:
        """Whether a frame that the container marks as a keyframe is coded without references."""
        if self._reads_vp9:
            return frame.pts in self._keyframes
        kind = frame.pict_type
        return kind == PictureType.I or (kind == PictureType.NONE and bool(frame.key_frame))


def _has_libvpx() -> bool:
    return VP9 in av.codecs_available
