"""The limit of bad videos."""

import numpy as np
import pytest

from pipelines.bad_samples import BadSample
from trainer.setup.bad_video_limit import (
    BadClipLimit,
    BadVideos,
    always_tolerated,
    exceeds_limit,
    is_surely_over_limit,
)


def found(count: int) -> BadVideos:
    videos = BadVideos()
    videos.add(BadSample(sample, f"{sample}.mp4", "is empty (0 bytes)") for sample in range(count))
    videos.add([BadSample(0, "0.mp4", "found by another rank, too")])
    return videos


def is_exceeded(found: BadVideos, *, bad: int, clips: int, share: float, videos: int) -> bool:
    limit = BadClipLimit(share, videos)
    limit.videos = found
    limit.add(clips, bad)
    return limit.is_exceeded


@pytest.mark.parametrize(
    ("videos", "share", "most"),
    [(1000, 0.01, 10), (1000, 0.0, 0), (50, 0.01, 3), (5, 0.01, 2), (1, 0.01, 0), (4, 1.0, 4), (4, 0.75, 3)],
)
def test_the_limit_is_a_share_and_at_least_three(videos: int, share: float, most: int) -> None:
    assert [bad for bad in range(videos + 1) if not exceeds_limit(bad, share, videos)] == list(
        range(most + 1)
    )


@pytest.mark.parametrize(
    ("opened", "videos", "share", "most"),
    [
        (8, 1000, 0.01, 3),  # four of eight: in one of 2.9 million samples
        (8, 1000, 0.05, 4),
        (8, 10**7, 0.3, 7),
        (8, 10**7, 0.9, 7),
        (8, 1000, 1.0, 8),
        (8, 1000, 0.0, 0),
        (5, 9, 0.01, 2 + 1),  # a set of 9 tolerates three bad videos, so three are no proof
        (8, 8, 0.3, 3),  # all are opened: no chance
        (8, 8, 0.5, 4),
        (1, 1, 0.01, 0),
        (2, 2, 0.3, 1),
    ],
)
def test_a_sample_is_refused_only_if_its_data_set_is_surely_over_the_limit(
    opened: int, videos: int, share: float, most: int
) -> None:
    noted = [bad for bad in range(opened + 1) if not is_surely_over_limit(bad, share, opened, videos)]
    assert noted == list(range(most + 1))


def test_data_sets_at_the_limit_are_rarely_refused_for_their_sample() -> None:
    """300 of 1,000 videos are bad, as many as the share allows."""
    random = np.random.default_rng(0)
    found = random.hypergeometric(300, 700, 8, size=20_000)
    assert np.mean([exceeds_limit(bad, 0.3, 8) for bad in found]) > 0.15
    assert np.mean([is_surely_over_limit(bad, 0.3, 8, 1000) for bad in found]) < 5e-4


def test_one_lost_video_of_a_small_set_stops_no_run() -> None:
    one = found(1)
    assert not is_exceeded(one, bad=2000, clips=100_000, share=0.01, videos=50)
    assert is_exceeded(one, bad=1, clips=50, share=0.0, videos=50)
    assert is_exceeded(one, bad=100, clips=100, share=0.01, videos=1)


def test_four_bad_videos_stop_a_run_by_their_share_of_the_clips() -> None:
    four = found(4)
    assert len(four) == 4 > always_tolerated(0.01, 50)
    assert is_exceeded(four, bad=9, clips=100, share=0.01, videos=50)
    assert not is_exceeded(four, bad=4, clips=100, share=0.01, videos=1000)
    assert four.first_reasons.count("is empty") == 3 and "found by another" not in four.first_reasons
