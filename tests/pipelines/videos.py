"""Test videos of every kind, encoded, remuxed and truncated with PyAV."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import dropwhile
from pathlib import Path

import av
import numpy as np

TICK = Fraction(1, 1000)  # time base of the frames' presentation times


@dataclass(frozen=True)
class Kind:
    """How a test video is made.

    size: (height, width). times: when each frame is shown, in ms; 40 apart if not given. colorspace,
    color_range: FFmpeg's numbers of the tags. degrees: the display matrix turns by so much. remake: makes the
    file from another that was encoded first.
    """

    codec: str
    extension: str
    options: dict[str, str] = field(default_factory=dict)
    pixels: str = "yuv420p"
    size: tuple[int, int] = (80, 112)
    frames: int = 40
    muxer: dict[str, str] = field(default_factory=dict)
    times: Callable[[int], int] = lambda index: 40 * index
    colorspace: int | None = None
    color_range: int | None = None
    degrees: float = 0.0
    remake: Callable[[Path, Path], None] | None = None


def moving_picture(frames: int, height: int, width: int) -> np.ndarray:
    """T H W 3 RGB: a sharp background that moves, with a patch in front that encodes the frame number."""
    background = np.random.default_rng(0).integers(0, 200, (height, width, 3)).astype(np.uint8)
    pictures = np.stack([np.roll(background, 3 * index, axis=1) for index in range(frames)])
    pictures[:, height // 4 : -height // 4, width // 4 : -width // 4] = (
        np.arange(frames) * 240 // frames
    ).astype(np.uint8)[:, None, None, None]
    return pictures


def make_video(folder: Path, kind: Kind, pictures: np.ndarray | None = None) -> Path:
    """Encode `pictures` (T H W 3 RGB), or the moving picture, as one of its kind."""
    path = folder / f"clip.{kind.extension}"
    if pictures is None:
        pictures = moving_picture(kind.frames, *kind.size)
    with ordinary_priority(), av.open(str(path), "w", options=kind.muxer) as container:
        stream = container.add_stream(kind.codec, rate=25, options=dict(kind.options))
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = kind.pixels
        stream.codec_context.time_base = Fraction(1, 25) if kind.codec in FIXED_RATE else TICK
        if kind.colorspace is not None:
            stream.codec_context.colorspace = kind.colorspace
        if kind.color_range is not None:
            stream.codec_context.color_range = kind.color_range
        if kind.degrees:
            stream.set_display_rotation(kind.degrees)
        for index, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if kind.pixels != "rgb24":
                frame = frame.reformat(
                    format=kind.pixels, dst_colorspace=kind.colorspace, dst_color_range=kind.color_range
                )
            if kind.codec not in FIXED_RATE:
                frame.pts, frame.time_base = kind.times(index), TICK
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if kind.remake is not None:
        original = path.with_name(f"original.{kind.extension}")
        path.rename(original)
        kind.remake(original, path)
    return path


@contextmanager
def ordinary_priority() -> Iterator[None]:
    """Restore the thread's scheduling policy at the end.

    SVT-AV1, run by root, gives the encoding thread permanent real-time priority, which the processes that it
    starts inherit: two of them that spin block a machine of two cores forever.
    """
    policy, parameter = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameter)


FIXED_RATE = frozenset({"mpeg2video", "mpeg4", "mjpeg", "mpeg1video"})


def decode_all(source: Path) -> np.ndarray:
    """Every frame that PyAV shows from the first keyframe on, upright, T H W 3 RGB."""
    pictures, start = [], None
    with av.open(str(source)) as container:
        for packet in dropwhile(lambda packet: not packet.is_keyframe, container.demux(video=0)):
            start = packet.pts if start is None else start
            for frame in packet.decode():
                if frame.pts is None or frame.pts >= start:
                    quarters = round(frame.rotation / 90)
                    pictures.append(np.rot90(frame.to_ndarray(format="rgb24"), quarters))
    return np.stack(pictures)


def copy_packets(
    original: Path,
    path: Path,
    change: Callable[[Sequence[av.Packet]], Sequence[av.Packet]],
    muxer: dict[str, str] | None = None,
) -> None:
    """Write the packets of `original`, after a `change`, into another file."""
    with av.open(str(original)) as source, av.open(str(path), "w", options=muxer or {}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in change([packet for packet in source.demux(video=0) if packet.size]):
            packet.stream = stream
            target.mux(packet)


def trim_by_edit_list(original: Path, path: Path) -> None:
    """Have an .mp4 begin in the middle of a group: an edit list leaves out what lies before."""

    def shifted(packets: Sequence[av.Packet]) -> Sequence[av.Packet]:
        cut = sorted(packet.pts for packet in packets)[7]
        for packet in packets:
            packet.pts, packet.dts = packet.pts - cut, packet.dts - cut
        return packets

    copy_packets(original, path, shifted, {"avoid_negative_ts": "disabled", "use_editlist": "1"})


def start_inside_a_group(original: Path, path: Path) -> None:
    """Leave out the first packets, as a recording of a broadcast does."""
    copy_packets(original, path, lambda packets: packets[3:])


def start_at_the_second_keyframe(original: Path, path: Path) -> None:
    """As a lossless cutter does."""

    def from_there(packets: Sequence[av.Packet]) -> Sequence[av.Packet]:
        return packets[[number for number, packet in enumerate(packets) if packet.is_keyframe][1] :]

    copy_packets(original, path, from_there)


def drop_avi_index(original: Path, path: Path) -> None:
    """An .avi as a crash leaves it: frames, no index."""
    content = original.read_bytes()
    path.write_bytes(content.replace(b"idx1", b"JUNK").replace(b"indx", b"JUNK"))


def pack_b_frames(original: Path, path: Path) -> None:
    """An MPEG-4 .avi as DivX 5 wrote it: a B-frame in the packet before it, and an empty one in its place."""
    empty = bytes.fromhex("000001b67f")  # a frame "not coded"
    with av.open(str(original)) as source, av.open(str(path), "w") as target:
        video = source.streams.video[0]
        packets = [bytes(packet) for packet in source.demux(video) if packet.size]
        kinds = [content[content.index(b"\0\0\1\xb6") + 4] >> 6 for content in packets]
        packed: list[bytes] = []
        for content, kind in zip(packets, kinds, strict=True):
            if kind == 2:
                packed[-1] += content
                packed.append(empty)
            else:
                packed.append(content)
        stream = target.add_stream_from_template(video)
        stream.codec_context.extradata = None
        signed = packed[0].replace(b"\0\0\1\xb2Lavc", b"\0\0\1\xb2DivX503b1393p\0\0\0\1\xb2Lavc")
        for index, content in enumerate([signed, *packed[1:]]):
            packet = av.Packet(content)
            packet.stream, packet.pts, packet.dts = stream, index, index
            packet.time_base, packet.is_keyframe = Fraction(1, 25), kinds[index] == 0
            target.mux(packet)


BF = {"g": "12", "x264-params": "bframes=3:b-adapt=0:b-pyramid=normal"}
X264_TABLE = {
    "h264": {},
    "h264 with B-frames": BF,
    "h264 without B-frames": {"bf": "0", "g": "12"},
    "h264 with open groups": {"g": "10", "x264-params": "open-gop=1:bframes=3:b-adapt=0:b-pyramid=normal"},
    "h264 interlaced": {"g": "12", "x264-params": "tff=1:bframes=3:b-adapt=0"},
    "h264 of several slices": {"g": "12", "x264-params": "slices=4:bframes=3:b-adapt=0"},
    "h264 refreshed piece by piece": {"g": "12", "x264-params": "intra-refresh=1:bframes=0"},
}
VP9 = {"auto-alt-ref": "1", "lag-in-frames": "12", "cpu-used": "8", "g": "15", "crf": "30", "b": "0"}
HEVC = "log-level=error:pools=none:frame-threads=1"


def uneven(index: int) -> int:
    """Times of a variable frame rate, in ms."""
    return 40 * index + 13 * (index % 3) + 200 * (index // 10)


KINDS = {
    **{name: Kind("libx264", "mp4", options) for name, options in X264_TABLE.items()},
    "h264 in mkv with open groups": Kind("libx264", "mkv", X264_TABLE["h264 with open groups"]),
    "h264 of odd size": Kind("libx264", "mp4", BF, "yuv444p", (81, 113)),
    "h264 of variable rate": Kind("libx264", "mp4", BF, times=uneven),
    "h264 turned": Kind("libx264", "mp4", BF, degrees=90),
    "h264 trimmed by an edit list": Kind("libx264", "mp4", BF, remake=trim_by_edit_list),
    "h264 with its index in front": Kind("libx264", "mp4", BF, muxer={"movflags": "faststart"}),
    "h264 in fragments": Kind("libx264", "mp4", BF, muxer={"movflags": "frag_keyframe+empty_moov"}),
    "h264 in mkv without cues": Kind("libx264", "mkv", BF, muxer={"live": "1"}),
    "h264 in avi": Kind("libx264", "avi", BF),
    "h264 in avi without index": Kind("libx264", "avi", BF, remake=drop_avi_index),
    "h264 in a transport stream": Kind("libx264", "ts", BF),
    "h264 with open groups in a transport stream": Kind("libx264", "ts", X264_TABLE["h264 with open groups"]),
    "h264 from inside a group": Kind("libx264", "ts", BF, remake=start_inside_a_group),
    "hevc": Kind("libx265", "mp4", {"g": "12", "x265-params": HEVC}),
    "h264 with open groups from inside a group": Kind(
        "libx264", "ts", X264_TABLE["h264 with open groups"], remake=start_inside_a_group
    ),
    "hevc from inside a group": Kind(
        "libx265", "ts", {"g": "12", "x265-params": HEVC}, remake=start_inside_a_group
    ),
    "mpeg2 from inside a group": Kind(
        "mpeg2video", "ts", {"bf": "2", "g": "12"}, remake=start_inside_a_group
    ),
    "mpeg4 from inside a group": Kind("mpeg4", "mkv", {"bf": "2", "g": "12"}, remake=start_inside_a_group),
    "hevc with layers": Kind("libx265", "mkv", {"g": "12", "x265-params": HEVC + ":temporal-layers=3"}),
    "vp9": Kind("libvpx-vp9", "webm", VP9),
    "vp9 of odd size": Kind("libvpx-vp9", "webm", VP9, size=(81, 113)),
    "vp9 of variable rate": Kind("libvpx-vp9", "webm", VP9, times=uneven),
    "vp9 turned": Kind("libvpx-vp9", "mkv", VP9, degrees=90),
    "vp9 in mp4": Kind("libvpx-vp9", "mp4", VP9),
    "vp9 trimmed by an edit list": Kind("libvpx-vp9", "mp4", VP9, remake=trim_by_edit_list),
    "vp9 from inside a group": Kind("libvpx-vp9", "webm", VP9, remake=start_inside_a_group),
    "vp9 in webm without cues": Kind("libvpx-vp9", "webm", VP9, muxer={"live": "1"}),
    "vp8": Kind("libvpx", "webm", {"auto-alt-ref": "1", "lag-in-frames": "12", "g": "15", "cpu-used": "8"}),
    "av1": Kind("libsvtav1", "mp4", {"preset": "12", "g": "16"}),
    "mjpeg": Kind("mjpeg", "avi", pixels="yuvj420p"),
    "mjpeg without index": Kind("mjpeg", "avi", pixels="yuvj420p", remake=drop_avi_index),
    "mpeg4": Kind("mpeg4", "mp4", {"g": "9"}),
    "mpeg4 with B-frames in avi": Kind("mpeg4", "avi", {"bf": "2", "g": "9"}),
    "mpeg4 with B-frames in avi without index": Kind(
        "mpeg4", "avi", {"bf": "2", "g": "9"}, remake=drop_avi_index
    ),
    "mpeg4 with packed B-frames": Kind("mpeg4", "avi", {"bf": "1", "g": "9"}, remake=pack_b_frames),
    "mpeg2 program stream": Kind("mpeg2video", "mpg", {"bf": "2", "g": "12"}),
    "mpeg2 transport stream": Kind("mpeg2video", "ts", {"bf": "2", "g": "12"}),
}
