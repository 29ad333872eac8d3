import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from pipelines.dataset.probe import VideoInfo, probe_video
from pipelines.errors import VideoError
from pipelines.synthetic.video_writer import H264, MJPEG, VP9, VideoFormat, encode_video

# Smooth pictures that change: pure noise would be stored raw, where no decoder can notice damage.
T, Y, X, C = np.ogrid[:30, :48, :64, :3]
FRAMES = (127 + 60 * np.sin((X + 2 * T) / 5 + C) + 60 * np.cos((Y + X - T) / 7)).astype(np.uint8)


def video(path: Path, video_format: VideoFormat = H264) -> Path:
    path = path.with_suffix(video_format.extension)
    encode_video(path, FRAMES, video_format, Fraction(25), keyframe_interval=12)
    return path


@pytest.mark.parametrize("video_format", [VP9, H264, MJPEG], ids=lambda f: f.codec)
def test_a_video_is_described(tmp_path, video_format):
    path = video(tmp_path / "v", video_format)
    distance = 1 if video_format is MJPEG else 12
    info = VideoInfo(
        frames=30, fps=25.0, width=64, height=48, codec=video_format.codec, keyframe_distance=distance
    )
    assert probe_video(path) == info
    assert probe_video(path.read_bytes()) == info
    assert probe_video(path, deep=True) == info


def test_frames_are_counted_not_read_from_the_header(tmp_path):
    path = video(tmp_path / "v", VP9)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0  # as in the header of a .webm
    assert probe_video(path).frames == 30
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert 5 < probe_video(path).frames < 25


def test_odd_sizes_cannot_be_encoded(tmp_path):
    with pytest.raises(ValueError, match="64x47"):
        encode_video(tmp_path / "v.mp4", FRAMES[:, :47], H264, 25, 12)


def defect(source: Path | bytes, *, deep: bool = False) -> str:
    with pytest.raises(VideoError) as caught:
        probe_video(source, deep=deep)
    return str(caught.value)


def test_defects_have_messages(tmp_path):
    missing = tmp_path / "missing.mp4"
    assert defect(missing) == "cannot be read: No such file or directory"
    empty = tmp_path / "empty.mp4"
    empty.touch()
    assert defect(empty) == defect(b"") == "is empty (0 bytes)"
    text = tmp_path / "text.mp4"
    text.write_text("I am no video, whatever my name says.\n" * 50)
    assert defect(text).startswith("is not a video, but text that begins with 'I am no video")
    text.write_bytes(bytes(range(256)) * 50)
    assert defect(text) == "is not a video, or is damaged: Invalid data found when processing input"
    cut = video(tmp_path / "cut")
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])  # the index of an .mp4 is at its end
    assert defect(cut).startswith("ends before its index (moov)")
    sound = tmp_path / "sound.wav"
    with wave.open(str(sound), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(4000))
    assert defect(sound) == "holds no video stream"
    headers = video(tmp_path / "headers", VP9)
    first_cluster = headers.read_bytes().index(bytes.fromhex("1f43b675"))
    headers.write_bytes(headers.read_bytes()[:first_cluster])
    assert defect(headers) == "is not a video, or is damaged: End of file"


def damaged(path: Path) -> Path:
    """Overwrite the second half of one coded keyframe; the container is unchanged."""
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][12]
        start, size = packet.pos, packet.size
    content = bytearray(path.read_bytes())
    half = size // 2
    content[start + half : start + size] = np.random.default_rng(1).bytes(size - half)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("video_format", [H264, MJPEG], ids=lambda f: f.codec)
def test_damage_inside_is_found_by_decoding_only(tmp_path, video_format):
    path = damaged(video(tmp_path / "v", video_format))
    assert probe_video(path).frames == 30
    assert "damaged" in defect(path, deep=True)
