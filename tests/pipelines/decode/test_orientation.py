"""All decoders apply the file's display matrix."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.dali.encoded_input import GraphDecoder, check_encoded
from pipelines.dataset.probe import probe_video
from pipelines.decode.orientation import Orientation
from pipelines.decode.pyav import decode_frames
from pipelines.errors import VideoError
from tests.pipelines.decode.test_decode import decode_by_dali, row_of
from tests.pipelines.videos import BF, VP9, Kind, decode_all, make_video

H264 = Kind("libx264", "mp4", BF)
UNIT = 1 << 16


def matrix_edited(video: Path, a: int, b: int, c: int, d: int) -> Path:
    """The .mp4 with another display matrix in its track header (ISO/IEC 14496-12, 8.3.2)."""
    content = bytearray(video.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40
    for place, value in ((0, a), (4, b), (12, c), (16, d)):
        content[matrix + place : matrix + place + 4] = value.to_bytes(4, "big", signed=True)
    edited = video.with_name("edited.mp4")
    edited.write_bytes(content)
    return edited


@pytest.mark.parametrize(
    ("matrix", "turn"),
    {
        "90": ((0, UNIT, -UNIT, 0), lambda picture: np.rot90(picture, -1)),
        "180": ((-UNIT, 0, 0, -UNIT), lambda picture: np.rot90(picture, 2)),
        "270": ((0, -UNIT, UNIT, 0), np.rot90),
        "mirrored": ((-UNIT, 0, 0, UNIT), np.fliplr),
        "upside down": ((UNIT, 0, 0, -UNIT), np.flipud),
        "transposed": ((0, UNIT, UNIT, 0), lambda picture: picture.swapaxes(0, 1)),
    }.values(),
    ids=["90", "180", "270", "mirrored", "upside-down", "transposed"],
)
def test_frames_are_rotated_by_the_display_matrix(tmp_path: Path, matrix: tuple, turn: object) -> None:
    plain = make_video(tmp_path, H264)
    coded = decode_all(plain)
    video = matrix_edited(plain, *matrix)
    expected = np.stack([turn(picture) for picture in coded])
    info = probe_video(video, deep=True)
    assert (info.height, info.width) == expected.shape[1:3]
    assert len(info.notes) == 1 and ("rotated" in info.notes[0] or "mirrored" in info.notes[0])
    np.testing.assert_array_equal(decode_frames(video, np.arange(0, 40, 7)), expected[::7])
    roi = decode_frames(video.read_bytes(), np.array([5]), (3, 8, 60, 70), size=expected.shape[1:3])
    np.testing.assert_array_equal(roi[0], expected[5, 3:60, 8:70])
    encoded = check_encoded(video.read_bytes(), row_of(video), np.array([3]), GraphDecoder.NVDEC)
    np.testing.assert_array_equal(Orientation(*encoded.orientation.astype(bool)).apply(coded[3]), expected[3])


def test_a_manifest_of_coded_sizes_is_refused(tmp_path: Path) -> None:
    video = make_video(tmp_path, Kind("libx264", "mp4", BF, degrees=90))
    with pytest.raises(VideoError, match=r"112x80.*rotation"):
        decode_frames(video, np.array([0]), size=(80, 112))
    with pytest.raises(VideoError, match=r"80x112.*80x80.*changed"):
        decode_frames(video, np.array([0]), size=(80, 80))


def test_the_graph_rotates_frames_as_pyav(tmp_path: Path, device: torch.device) -> None:
    kind = H264 if device.type == "cuda" else Kind("libvpx-vp9", "mkv", VP9)
    videos = []
    for degrees in (0, 90, 180, 270):
        folder = tmp_path / str(degrees)
        folder.mkdir()
        videos.append(make_video(folder, replace(kind, degrees=degrees)))
    for video, decoded in zip(videos, decode_by_dali(videos, [0, 9, 30], device), strict=True):
        expected = decode_frames(video, np.array([0, 9, 30]))
        assert decoded.shape == expected.shape
        assert np.abs(decoded.astype(int) - expected).mean() < 6  # of chroma; other frames differ by 40


def test_a_rotation_by_another_angle_is_reported_and_not_applied(tmp_path: Path) -> None:
    plain = make_video(tmp_path, H264)
    slanted = int(UNIT * 0.5), int(UNIT * 0.866), -int(UNIT * 0.866), int(UNIT * 0.5)
    video = matrix_edited(plain, *slanted)
    (note,) = probe_video(video).notes
    assert "60 degrees" in note and "not applied" in note
    np.testing.assert_array_equal(decode_frames(video, np.array([3]))[0], decode_all(plain)[3])
