"""Windows over a video's time."""

import numpy as np
import pytest

from pipelines.sampling.sliding_windows import sliding_windows


def test_windows_are_consecutive_and_reach_the_end() -> None:
    windows = sliding_windows(np.arange(100) / 25, 4.0, 1.5, 1.5)
    assert [(each.start, each.end) for each in windows] == [(0, 1.5), (1.5, 3), (2.5, 4)]
    # A frame belongs to the window in which it begins: 1.5 s lies between frame 37 and 38.
    assert [(each.first, each.frames) for each in windows] == [(0, 38), (38, 37), (63, 37)]


def test_a_window_that_ends_with_the_video_comes_once() -> None:
    windows = sliding_windows(np.arange(30) / 10, 3.0, 1.0, 0.1)
    assert len(windows) == 21
    assert [each.frames for each in windows] == [10] * 21
    assert [each.first for each in windows] == list(range(21))


@pytest.mark.parametrize("frames", [1, 5])
def test_a_short_video_is_one_window(frames: int) -> None:
    (window,) = sliding_windows(np.arange(frames) / 25, frames / 25, 10, 5)
    assert (window.first, window.frames, window.end) == (0, frames, frames / 25)


def test_a_window_without_a_frame_has_the_one_still_shown() -> None:
    windows = sliding_windows(np.array([0.0, 0.1, 3.0]), 3.1, 1.0, 1.0)
    assert [(each.first, each.frames) for each in windows] == [(0, 2), (1, 1), (1, 1), (2, 1)]
    assert windows[1].indices(4, 1).tolist() == [1, 1, 1, 1]
