"""Headers of coded pictures."""

import av
import pytest

from pipelines.decode.color import UNSUPPORTED_MATRICES, check_colorspace
from pipelines.decode.picture_headers import PictureScan, nal_types, nal_units
from pipelines.errors import VideoError
from tests.pipelines.field_pictures import field_pictures
from tests.pipelines.videos import BF, Kind, make_video


def scan_of(path: object, codec: str) -> PictureScan:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        scan = PictureScan(codec, stream.codec_context.extradata or b"")
        for packet in container.demux(stream):
            if packet.size:
                scan.add(bytes(packet))
    return scan


@pytest.mark.parametrize(
    ("kind", "codec", "b_pictures"),
    [
        (Kind("libx264", "mp4", BF), "h264", True),
        (Kind("libx264", "ts", BF), "h264", True),
        (Kind("libx264", "mp4", {"bf": "0"}), "h264", False),
        (Kind("mpeg2video", "ts", {"bf": "2"}), "mpeg2video", True),
        (Kind("mpeg2video", "ts", {"bf": "0"}), "mpeg2video", False),
        (Kind("mpeg4", "mp4", {"bf": "2"}), "mpeg4", True),
        (Kind("mpeg4", "mp4", {"bf": "0"}), "mpeg4", False),
    ],
)
def test_b_pictures_are_detected(tmp_path, kind, codec, b_pictures) -> None:
    scan = scan_of(make_video(tmp_path, kind), codec)
    assert scan.b_pictures is b_pictures
    assert not scan.field_pictures


@pytest.mark.parametrize("first_macroblock", ["1", "010"])
@pytest.mark.parametrize("kind", range(10))
def test_each_type_of_slice_is_read_at_any_macroblock(kind: int, first_macroblock: str) -> None:
    code = bin(kind + 1)[2:]
    bits = (first_macroblock + "0" * (len(code) - 1) + code).ljust(16, "1")
    scan = PictureScan("h264", b"")
    scan.add(b"\x00\x00\x01\x41" + int(bits, 2).to_bytes(2, "big"))
    assert scan.b_pictures is (kind in (1, 6))  # ITU-T H.264, table 7-6


def test_field_pictures_are_detected_and_interlaced_frames_are_not(tmp_path) -> None:
    path = tmp_path / "fields.h264"
    path.write_bytes(field_pictures(3))
    assert scan_of(path, "h264").field_pictures
    interlaced = Kind("libx264", "mp4", {"x264-params": "tff=1:bframes=2:b-adapt=0"})
    scan = scan_of(make_video(tmp_path, interlaced), "h264")
    assert scan.may_have_fields and not scan.field_pictures


@pytest.mark.parametrize("extradata", [b"", b"\x01\x4d\x00\x1e\xff\xe1\xff\xff\x67", b"\x00\x00\x01\x67"])
def test_truncated_and_endless_headers_are_unknown(extradata) -> None:
    scan = PictureScan("h264", extradata + bytes(200_000))
    scan.add(b"\x00\x00\x01\x65")
    scan.add(b"\x00\x00\x00")
    assert not scan.b_pictures and not scan.may_have_fields


def test_units_are_found_by_start_codes_and_by_lengths() -> None:
    annex_b = b"\x00\x00\x00\x01\x67ab\x00\x00\x01\x68\x00\x00\x01\x65cd"
    assert [*nal_types(annex_b, "h264", b"")] == [7, 8, 5]
    lengths = b"\x00\x00\x00\x03\x67ab\x00\x00\x00\x00\x00\x00\x00\x03\x65cd\x00\x00\x00\xffx"
    record = b"\x01\x4d\x00\x1e\xff"
    assert [*nal_units(lengths, "h264", record)] == [b"\x67ab", b"\x65cd", b"x"]


def test_matrices_that_ffmpeg_does_not_convert_are_named() -> None:
    for number, name in UNSUPPORTED_MATRICES.items():
        with pytest.raises(VideoError, match=f"colours in {name}"):
            check_colorspace(number)
    check_colorspace(1)
