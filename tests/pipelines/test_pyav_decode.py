"""Frame-exact decoding, held against decoding everything."""

from pathlib import Path

import av
import numpy as np
import pytest

from pipelines import VideoDefect
from pipelines.pyav_decode import decode_frames

CODECS = {
    "h264 with B-frames": ("libx264", "mp4", {"bf": "3", "g": "12"}, "yuv420p"),
    "h264 of one group": ("libx264", "mp4", {"bf": "2", "g": "250"}, "yuv420p"),
    "h264 with open groups": (
        "libx264",
        "mkv",
        {"bf": "2", "g": "10", "x264-params": "open-gop=1"},
        "yuv420p",
    ),
    "hevc": ("libx265", "mp4", {"g": "12", "x265-params": "log-level=error"}, "yuv420p"),
    "vp9 with hidden frames": (
        "libvpx-vp9",
        "webm",
        {"auto-alt-ref": "1", "lag-in-frames": "12", "cpu-used": "8", "g": "15"},
        "yuv420p",
    ),
    "mjpeg": ("mjpeg", "avi", {}, "yuvj420p"),
    "mpeg4": ("mpeg4", "mp4", {"g": "9"}, "yuv420p"),
    "mpeg4 with B-frames in avi": ("mpeg4", "avi", {"bf": "2", "g": "9"}, "yuv420p"),
    "mpeg2 program stream": ("mpeg2video", "mpg", {"bf": "2", "g": "12"}, "yuv420p"),
    "av1": ("libsvtav1", "mp4", {"preset": "12", "g": "16"}, "yuv420p"),
}
FRAMES = 40


def encode(path: Path, codec: str, options: dict[str, str], pixels: str) -> None:
    rng = np.random.default_rng(0)
    background = rng.integers(0, 200, (80, 112, 3)).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 112, 80, pixels
        for index in range(FRAMES):
            frame = np.roll(background, 3 * index, axis=1)
            frame[20:60, 20:60] = 6 * index
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def decode_all(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames)


@pytest.fixture(scope="module", params=CODECS, ids=lambda name: name.replace(" ", "-"))
def video(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    codec, container, options, pixels = CODECS[request.param]
    path = tmp_path_factory.mktemp("videos") / f"clip.{container}"
    encode(path, codec, options, pixels)
    return path


@pytest.mark.parametrize(
    "indices",
    [[0], [39], [0, 5, 10, 15, 20, 25, 30, 35], [11, 12, 13], [38, 2, 2, 20, 0]],
    ids=["first", "last", "sparse", "neighbours", "any-order-with-repeats"],
)
def test_frames_equal_a_full_decode(video: Path, indices: list[int]) -> None:
    expected = decode_all(video)
    assert len(expected) == FRAMES
    np.testing.assert_array_equal(decode_frames(video, np.array(indices)), expected[indices])
    np.testing.assert_array_equal(decode_frames(video.read_bytes(), np.array(indices)), expected[indices])


def test_defects_say_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    codec, _, options, pixels = CODECS["h264 with B-frames"]
    encode(path, codec, options, pixels)
    with pytest.raises(VideoDefect, match="holds 40 frames, frame 40 was asked for"):
        decode_frames(path, np.array([40]))
    empty, text = tmp_path / "empty.mp4", tmp_path / "text.mp4"
    empty.touch()
    text.write_text("this is no video\n" * 100)
    with pytest.raises(VideoDefect, match="is empty"):
        decode_frames(empty, np.array([0]))
    with pytest.raises(VideoDefect, match="is not a video"):
        decode_frames(text, np.array([0]))
    with pytest.raises(VideoDefect, match="cannot be read: No such file"):
        decode_frames(tmp_path / "gone.mp4", np.array([0]))
