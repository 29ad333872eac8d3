import numpy as np
import pytest

from pipelines.sampling.temporal import train_indices, view_indices


@pytest.mark.parametrize("frames", [1, 3, 8, 9, 16, 300])
def test_train_frames_come_from_their_segments_and_reach_both_ends(frames: int) -> None:
    drawn = np.stack([train_indices(frames, 8, np.random.default_rng(seed)) for seed in range(400)])
    edges = np.round((frames - 1) / 8 * np.arange(9))
    assert (drawn >= edges[:-1]).all()
    assert (drawn <= edges[1:]).all()
    np.testing.assert_array_equal(drawn.min(axis=0), edges[:-1])
    if frames < 100:  # 400 draws from segments of 38 frames may miss an end
        np.testing.assert_array_equal(drawn.max(axis=0), edges[1:])


def test_view_frames_by_hand() -> None:
    # 30 frames: segments of 29/4 = 7.25, starts round(0, 7.25, 14.5, 21.75) with halves to even
    np.testing.assert_array_equal(view_indices(30, 4, 1), [[3, 10, 17, 25]])
    np.testing.assert_array_equal(view_indices(30, 4, 2), [[2, 9, 16, 24], [4, 11, 18, 26]])


def test_a_video_of_one_frame_repeats_it() -> None:
    np.testing.assert_array_equal(view_indices(1, 4, 3), np.zeros((3, 4)))
