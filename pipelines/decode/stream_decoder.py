"""A stream's decoder, made to tell of damage where it can."""

import av
from av.video.frame import PictureType

from pipelines.decode.frame_sizes import vp9_keyframe
from pipelines.decode.orientation import UPRIGHT, Orientation, orientation_of

# FFmpeg hides damage: it repeats what it has. Most of its decoders say so of the frame; these have to be
# told. The others stay lenient, as their strict mode refuses streams that every player shows well. HEVC may
# carry a checksum of each picture, which is compared then.
STRICT = {"hevc": "explode+crccheck", "mjpeg": "explode"}

# FFmpeg's own decoder of VP9 notices next to nothing; Google's sees that a frame's data end too early, and
# shows the same pixels.
VP9 = "libvpx-vp9"
VP9_PIXELS = frozenset({"yuv420p", "yuv444p"})
"""What every build of it decodes."""


class StreamDecoder:
    """The decoder of a video stream, set to one thread, or to as many as there are cores.

    Damage shows itself by an av.FFmpegError, or by `is_corrupt` of a frame.
    """

    def __init__(self, stream: "av.video.stream.VideoStream", *, threads: bool = False) -> None:
        self._own = stream.codec_context
        self._codec = self._own
        self.name = self._own.name
        self.field_order = self._own.field_order
        self._orientation: Orientation | None = None  # as FFmpeg's own decoder of VP9 has it
        self._read: tuple[int, Orientation] | None = None  # the rotation it was read at, and all of it
        self._keyframes: set[int | None] = set()
        self._reads_vp9 = self.name == "vp9" and self._own.pix_fmt in VP9_PIXELS and _has_libvpx()
        if self._reads_vp9:
            self._codec = av.VideoCodecContext.create(VP9, "r")
            for name in ("extradata", "color_range", "color_primaries", "color_trc", "colorspace"):
                setattr(self._codec, name, getattr(self._own, name))
        for codec in {self._own, self._codec}:
            # Of clips many are decoded at once: there, threads would add copies and delay.
            codec.thread_type = "AUTO" if threads else "NONE"
        if self.name in STRICT:
            self._codec.options = {"err_detect": STRICT[self.name]}

    def skip_unreferenced(self, skips: bool) -> None:
        """Whether frames that no other frame refers to are left out from now on."""
        self._codec.skip_frame = "NONREF" if skips else "DEFAULT"

    def decode(self, packet: "av.Packet | None") -> list["av.VideoFrame"]:
        """The frames that come out for a packet; for None, those that were held back.

        Raises av.FFmpegError.
        """
        if self._reads_vp9 and packet is not None:
            if self._orientation is None:
                self._orientation = self._orientation_by_own(packet)
            if vp9_keyframe(bytes(memoryview(packet)[:4])):
                self._keyframes.add(packet.pts)
        return self._codec.decode(packet)

    def _orientation_by_own(self, packet: "av.Packet") -> Orientation:
        """The orientation that FFmpeg's own decoder reads from the file; `VP9` is not told of it."""
        frames = [*self._own.decode(packet), *self._own.decode(None)]
        self._own.flush_buffers()
        return orientation_of(frames[0]) if frames else UPRIGHT

    def end(self) -> None:
        """Forget all, to begin anew at another keyframe."""
        self._codec.flush_buffers()

    def orientation(self, frame: "av.VideoFrame") -> Orientation:
        """How the frame, the last that came out, is turned.

        Its display matrix is read at keyframes and where its rotation changes. PyAV keeps each frame whose
        side data was asked for until Python's cycle collector comes by: 250 frames, 780 MB in 1920x1080.
        """
        if self._orientation is not None:
            return self._orientation
        rotation = frame.rotation
        if self._read is None or frame.key_frame or rotation != self._read[0]:
            self._read = rotation, orientation_of(frame)
        return self._read[1]

    def is_intra(self, frame: "av.VideoFrame") -> bool:
        """Whether a frame that the container calls a keyframe is coded without others."""
        if self._reads_vp9:
            return frame.pts in self._keyframes
        kind = frame.pict_type
        return kind == PictureType.I or (kind == PictureType.NONE and bool(frame.key_frame))


def _has_libvpx() -> bool:
    return VP9 in av.codecs_available
