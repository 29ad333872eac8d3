"""How many bad videos a run does without."""

import pytest

from pipelines.defects import Defect
from trainer.bad_videos import BadVideos, few, too_many


def found(count: int) -> BadVideos:
    videos = BadVideos()
    videos.add(Defect(sample, f"{sample}.mp4", "is empty (0 bytes)") for sample in range(count))
    videos.add([Defect(0, "0.mp4", "found by another rank, too")])
    return videos


@pytest.mark.parametrize(
    ("videos", "share", "most"),
    [(1000, 0.01, 10), (1000, 0.0, 0), (50, 0.01, 3), (5, 0.01, 2), (1, 0.01, 0), (4, 1.0, 4), (4, 0.75, 3)],
)
def test_the_limit_is_a_share_and_at_least_a_few(videos: int, share: float, most: int) -> None:
    assert [bad for bad in range(videos + 1) if not too_many(bad, share, videos)] == list(range(most + 1))


def test_a_lost_video_of_a_small_set_stops_no_run_however_often_it_comes() -> None:
    one = found(1)
    assert not one.too_many(bad=2000, clips=100_000, share=0.01, videos=50)
    assert one.too_many(bad=1, clips=50, share=0.0, videos=50)
    assert one.too_many(bad=100, clips=100, share=0.01, videos=1)


def test_more_than_a_few_videos_stop_a_run_by_their_share_of_the_clips() -> None:
    four = found(4)
    assert len(four) == 4 > few(0.01, 50)
    assert four.too_many(bad=9, clips=100, share=0.01, videos=50)
    assert not four.too_many(bad=4, clips=100, share=0.01, videos=1000)
    assert four.first_reasons.count("is empty") == 3 and "found by another" not in four.first_reasons
