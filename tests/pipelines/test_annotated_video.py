"""Videos with text over them: times, sizes, rotation, and what the font lacks."""

from pathlib import Path

import numpy as np
import pytest

from pipelines.annotated_video import UNKNOWN, annotate_video, draw_lines, printable_text
from pipelines.decode.frame_stream import FrameStream
from pipelines.errors import DataError
from tests.pipelines.videos import Kind, make_video, uneven

LINES = (("jump", 0.75), ("run", 0.1))


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        (Kind("libx264", "mp4", size=(81, 113), pixels="yuv444p", frames=9), (82, 114)),
        (Kind("libx264", "mp4", size=(80, 112), degrees=90, frames=9), (112, 80)),
        (Kind("libx264", "mkv", times=uneven, frames=9), (80, 112)),
        (Kind("mjpeg", "avi", pixels="yuvj420p", size=(6, 8), frames=1), (16, 16)),
        (Kind("libx264", "mp4", size=(1200, 2000), frames=2), (1080, 1800)),
    ],
    ids=["odd", "rotated", "uneven", "tiny", "large"],
)
def test_frames_keep_their_times_and_their_size(kind: Kind, size: tuple[int, int], tmp_path: Path) -> None:
    stream = FrameStream(make_video(tmp_path, kind))
    calls: list[tuple[int, int]] = []
    annotate_video(stream, tmp_path / "out.mp4", lambda _: LINES, lambda *now: calls.append(now))
    written = FrameStream(tmp_path / "out.mp4")
    assert written.seconds == pytest.approx(stream.seconds, abs=1e-3)
    assert calls[-1] == (stream.frames, stream.frames)
    _, picture = next(written.pictures())
    assert picture.shape == (*size, 3)
    assert not list(tmp_path.glob(".*.partial"))


def test_frames_closer_than_a_tick_follow_one_another(tmp_path: Path) -> None:
    stream = FrameStream(make_video(tmp_path, Kind("libx264", "mp4", frames=9)))
    stream.seconds = np.arange(9) * 1e-6
    annotate_video(stream, tmp_path / "out.mp4", lambda _: LINES)
    assert FrameStream(tmp_path / "out.mp4").frames == 9


def test_the_picture_above_the_text_is_the_videos(tmp_path: Path) -> None:
    path = make_video(tmp_path, Kind("libx264", "mp4", size=(160, 240), degrees=90, frames=4))
    shown = [picture.copy() for _, picture in FrameStream(path).pictures()]
    annotate_video(FrameStream(path), tmp_path / "out.mp4", lambda _: LINES)
    for before, (_, after) in zip(shown, FrameStream(tmp_path / "out.mp4").pictures(), strict=True):
        above = np.abs(before[:160].astype(int) - after[:160]).mean()
        below = np.abs(before[-20:].astype(int) - after[-20:]).mean()
        assert above < 12 < below, (above, below)


def test_bars_are_as_long_as_the_shares() -> None:
    picture = np.full((220, 480, 3), 255, np.uint8)
    draw_lines(picture, (("a", 1.0), ("b", 0.5), ("c", 0.0)))
    blue = (np.abs(picture.astype(int) - (42, 120, 190)) < 3).all(axis=2)
    rows = [row.sum() for row in blue if row.any()]
    assert max(rows) > 1.7 * min(rows) > 0
    draw_lines(np.full((16, 16, 3), 255, np.uint8), LINES)  # too small for most of the panel


def test_characters_that_the_font_lacks_become_boxes() -> None:
    assert printable_text("jump бег") == "jump бег"
    assert printable_text("跳ぶ\x1b[31m\n") == f"{UNKNOWN * 3}[31m{UNKNOWN}"


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    stream = FrameStream(make_video(tmp_path, Kind("libx264", "mp4", frames=2)))
    with pytest.raises(DataError, match=r"nowhere/out\.mp4 cannot be written"):
        annotate_video(stream, tmp_path / "nowhere" / "out.mp4", lambda _: LINES)
