import numpy as np
import pytest

from pipelines.draw import TrainClip, draw_clip
from pipelines.plan import TrainPlan, ViewPlan, permute


@pytest.mark.parametrize("samples", [1, 2, 3, 7, 64, 1000, 4097])
def test_an_epoch_is_a_permutation(samples: int) -> None:
    order = [permute(index, samples, seed=5, epoch=2) for index in range(samples)]
    assert sorted(order) == list(range(samples))


def test_permutations_look_random() -> None:
    samples = 2000
    orders = np.array(
        [
            [permute(i, samples, seed, epoch) for i in range(samples)]
            for seed, epoch in [(0, 0), (0, 1), (1, 0)]
        ]
    )
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs(np.corrcoef(orders[one], orders[other])[0, 1]) < 0.08  # 3.6 standard deviations
    for order in orders:
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.08
        assert abs(np.corrcoef(order, np.arange(samples))[0, 1]) < 0.08


def test_any_place_of_a_hundred_million_clips_is_found_at_once() -> None:
    plan = TrainPlan(100_000_000, 512, seed=1)
    slots = [plan.slot(step=10**7, place=place) for place in range(512)]
    assert len({slot.sample for slot in slots}) == 512
    assert all(0 <= slot.sample < 100_000_000 for slot in slots)


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_shows_every_sample_once_though_batches_straddle_it(shuffle: bool) -> None:
    plan = TrainPlan(samples=10, global_batch=4, seed=0, shuffle=shuffle)
    stream = [plan.slot(step, place) for step in range(10) for place in range(4)]
    for epoch in range(4):
        shown = [slot.sample for slot in stream if slot.epoch == epoch]
        assert sorted(shown) == list(range(10))
    assert plan.epoch_of(5) == 2.0


def test_repeats_stand_side_by_side_and_share_their_frames_only() -> None:
    plan = TrainPlan(samples=6, global_batch=4, seed=0, repeats=2)
    slots = [plan.slot(0, place) for place in range(4)]
    assert [slot.repeat for slot in slots] == [0, 1, 0, 1]
    assert slots[0].sample == slots[1].sample != slots[2].sample
    clip = TrainClip(8, 64)
    draws = [
        draw_clip(clip, seed=0, epoch=0, sample=3, repeat=repeat, frames=90, height=256, width=340)
        for repeat in (0, 1)
    ]
    np.testing.assert_array_equal(draws[0].indices, draws[1].indices)
    assert not np.array_equal(draws[0].crop, draws[1].crop)


@pytest.mark.parametrize(("samples", "batch", "ranks"), [(1, 4, 3), (12, 4, 3), (13, 4, 3), (50, 7, 2)])
def test_evaluation_sees_every_video_once(samples: int, batch: int, ranks: int) -> None:
    plan = ViewPlan(samples, batch, ranks)
    dealt = [
        plan.sample(rank, number, place)
        for rank in range(ranks)
        for number in range(plan.batches)
        for place in range(batch)
    ]
    assert sorted(sample for sample in dealt if sample >= 0) == list(range(samples))
    assert len(dealt) - samples < batch * ranks
