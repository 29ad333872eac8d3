"""Frames are numbered in the decoder's output order, whatever the container's times are."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from pipelines.dataset.probe import probe_video
from pipelines.decode.demux import open_video, read_index
from pipelines.decode.pyav import decode_frames
from tests.pipelines.field_pictures import field_pictures, grey
from tests.pipelines.videos import (
    BF,
    HEVC,
    Kind,
    copy_packets,
    decode_all,
    make_video,
    moving_picture,
)

DATA = Path(__file__).parent.parent / "data"

B_H264 = Kind("libx264", "mkv", BF)
B_HEVC = Kind("libx265", "mkv", {"g": "12", "x265-params": HEVC})
B_MPEG4 = Kind("mpeg4", "mkv", {"bf": "2", "g": "12"})
B_MPEG2 = Kind("mpeg2video", "mkv", {"bf": "2", "g": "12"})
B_MPEG1 = Kind("mpeg1video", "mkv", {"bf": "2", "g": "12"})
OPEN = Kind("libx264", "mkv", {"g": "10", "x264-params": "open-gop=1:bframes=3:b-adapt=0:b-pyramid=normal"})


def decoding_times(packets: Sequence[av.Packet]) -> Sequence[av.Packet]:
    """Decoding times in place of display times, as many programs write them."""
    for packet, time in zip(packets, sorted(packet.pts for packet in packets), strict=True):
        packet.pts = packet.dts = time
    return packets


def remade(
    folder: Path, kind: Kind, extension: str, change: Callable[[Sequence[av.Packet]], Sequence[av.Packet]]
) -> tuple[Path, np.ndarray]:
    """The video in another container after a change of its packets, and the frames of the original."""
    original = make_video(folder, kind)
    path = folder / f"remade.{extension}"
    copy_packets(original, path, change)
    return path, decode_all(original)


def check(path: Path, expected: np.ndarray) -> None:
    """Every frame by its number, alone and with others, from a path and from bytes."""
    last = len(expected) - 1
    for indices in (*([number] for number in range(0, last + 1, 3)), [last, 1, 2, 1], range(last + 1)):
        for source in (path, path.read_bytes()):
            decoded = decode_frames(source, np.array(indices))
            np.testing.assert_array_equal(decoded, expected[indices], err_msg=f"{path.name} {indices}")
    assert probe_video(path).frames == probe_video(path, deep=True).frames == len(expected)


STORED = [
    *((kind, "mkv") for kind in (B_H264, OPEN, B_HEVC, B_MPEG4, B_MPEG2, B_MPEG1)),
    *((kind, "avi") for kind in (B_MPEG4, B_MPEG2, B_MPEG1)),
]


@pytest.mark.parametrize(
    ("kind", "extension"), STORED, ids=[f"{kind.codec}-{extension}" for kind, extension in STORED]
)
def test_decoding_times_are_not_used_as_display_times(tmp_path: Path, kind: Kind, extension: str) -> None:
    path, expected = remade(tmp_path, replace(kind, extension=extension), extension, decoding_times)
    check(path, expected)
    if extension == "mkv":  # FFmpeg derives display times for some codecs in AVI
        assert any("no usable times" in note for note in probe_video(path).notes)


def test_frames_of_avi_files_are_numbered_as_in_ffmpeg() -> None:
    """Made by `ffmpeg -f lavfi -i testsrc2=s=64x48:r=25:d=1.6 -c:v libx264 -crf 40 -g 12 x.avi`; the sums are
    of the frames that `ffmpeg -i x.avi -pix_fmt rgb24 -f framemd5 -` gives out.
    """
    path = DATA / "ffmpeg_h264.avi"
    sums = (DATA / "ffmpeg_h264.md5").read_text().split()
    assert probe_video(path, deep=True).frames == len(sums) == 40
    for number, expected in enumerate(sums):
        (frame,) = decode_frames(path, np.array([number]))
        assert hashlib.md5(frame.tobytes()).hexdigest() == expected, number


@pytest.mark.parametrize("options", [BF, {"bf": "0", "g": "12"}], ids=["B", "P"])
@pytest.mark.parametrize("begin", [100_000, 400], ids=["apart", "overlapping"])
def test_a_clock_set_back_loses_no_frame(tmp_path: Path, options: dict[str, str], begin: int) -> None:
    """Two recordings in one transport stream, the first of them by a clock that is ahead."""
    recordings = []
    for name, ahead in (("first", begin), ("second", 0)):
        (tmp_path / name).mkdir()
        kind = Kind("libx264", "ts", options, times=lambda index, ahead=ahead: 40 * index + ahead)
        recordings.append(make_video(tmp_path / name, kind))
    path = tmp_path / "both.ts"
    path.write_bytes(b"".join(recording.read_bytes() for recording in recordings))
    check(path, np.concatenate([decode_all(recording) for recording in recordings]))


def test_leading_b_pictures_without_a_reference_are_not_frames(tmp_path: Path) -> None:
    """As `ffmpeg -ss` cuts MPEG-2: the times rise although the B-pictures lack their references."""

    def cut(packets: Sequence[av.Packet]) -> Sequence[av.Packet]:
        first = [number for number, packet in enumerate(packets) if packet.is_keyframe][1]
        rest = packets[first:]
        for number, packet in enumerate(rest[1:3], start=1):
            packet.pts = rest[0].pts + number
        return rest

    path, expected = remade(tmp_path, B_MPEG2, "nut", cut)
    with av.open(str(path)) as container:
        decoded = sum(len(packet.decode()) for packet in container.demux(video=0))
    assert decoded == probe_video(path).frames == probe_video(path, deep=True).frames
    check(path, expected[-decoded:])


def test_pairs_of_field_pictures_are_counted_as_frames(tmp_path: Path) -> None:
    path = tmp_path / "fields.h264"
    path.write_bytes(field_pictures(12))
    mp4 = tmp_path / "fields.mp4"
    with av.open(str(path)) as source, av.open(str(mp4), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(packet for packet in source.demux(video=0) if packet.size):
            packet.stream, packet.time_base = stream, Fraction(1, 50)
            packet.pts = packet.dts = number
            target.mux(packet)
    for video in (path, mp4):
        assert probe_video(video).frames == probe_video(video, deep=True).frames == 12
        frames = decode_frames(video, np.arange(12)).astype(int)
        luma = (frames[..., 1] * 219 / 255 + 16).mean(axis=(1, 2))
        assert np.abs(luma - [grey(number) + 0.5 for number in range(12)]).max() < 1


@pytest.mark.parametrize(
    "kind",
    [
        Kind("libx264", "mkv", {"bf": "0", "g": "12"}),
        Kind("mpeg2video", "mkv", {"bf": "0", "g": "12"}),
        Kind("mpeg4", "avi", {"g": "12"}),
        B_H264,
        OPEN,
        B_HEVC,
    ],
    ids=["h264", "mpeg2", "mpeg4", "h264-B", "h264-open", "hevc-B"],
)
def test_valid_times_define_the_display_order(tmp_path: Path, kind: Kind) -> None:
    """Otherwise every clip would cost a decoding from the start."""
    with open_video(make_video(tmp_path, kind)) as (container, stream):
        index = read_index(container, stream)
    assert index.ordered and index.keyframe_distance <= 12 and len(index.display_order) == 40


def test_frames_without_a_keyframe_mark_are_decoded(tmp_path: Path) -> None:
    """RoQ marks none."""
    path = tmp_path / "clip.roq"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("roqvideo", rate=30)
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuvj444p"
        for picture in moving_picture(10, 64, 128):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuvj444p")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        expected = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    check(path, expected)
