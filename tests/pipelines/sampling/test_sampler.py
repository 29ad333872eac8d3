import pickle
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from pipelines.augment.params import TrainClipSpec, draw_clip_params
from pipelines.sampling.sampler import Part, Slot, TrainSampler, ViewSampler, permute


@dataclass
class Widths:
    """Weights in memory."""

    weights: list[float]

    def __post_init__(self) -> None:
        self.ends = np.cumsum(self.weights)
        self.total_weight = float(self.ends[-1])

    def row_at_weight(self, weight: float) -> int:
        assert 0 <= weight < self.total_weight
        return int(np.searchsorted(self.ends, weight, side="right"))


def stream(sampler: TrainSampler, steps: int) -> list[Slot]:
    return [sampler.slot(step, index) for step in range(steps) for index in range(sampler.global_batch)]


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


def test_any_slot_of_a_hundred_million_clips_is_computed_directly() -> None:
    sampler = TrainSampler(100_000_000, 512, seed=1)
    slots = [sampler.slot(step=10**7, index=index) for index in range(512)]
    assert len({slot.sample for slot in slots}) == 512
    assert all(0 <= slot.sample < 100_000_000 for slot in slots)


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_shows_every_sample_once_though_batches_straddle_it(shuffle: bool) -> None:
    sampler = TrainSampler(samples=10, global_batch=4, seed=0, shuffle=shuffle)
    stream = [sampler.slot(step, index) for step in range(10) for index in range(4)]
    for epoch in range(4):
        shown = [slot.sample for slot in stream if slot.epoch == epoch]
        assert sorted(shown) == list(range(10))
    assert sampler.epoch_of(5) == 2.0


def test_repeats_are_adjacent_and_share_their_frames_only() -> None:
    sampler = TrainSampler(samples=6, global_batch=4, seed=0, repeats=2)
    slots = [sampler.slot(0, index) for index in range(4)]
    assert [slot.repeat for slot in slots] == [0, 1, 0, 1]
    assert slots[0].sample == slots[1].sample != slots[2].sample
    clip = TrainClipSpec(8, 64)
    draws = [
        draw_clip_params(clip, seed=0, epoch=0, sample=3, repeat=repeat, frames=90, height=256, width=340)
        for repeat in (0, 1)
    ]
    np.testing.assert_array_equal(draws[0].indices, draws[1].indices)
    assert not np.array_equal(draws[0].arrays["crop_matrix"], draws[1].arrays["crop_matrix"])


def test_the_stream_of_one_dataset_is_that_of_earlier_versions() -> None:
    sampler = TrainSampler(samples=1000, global_batch=4, seed=3, repeats=2)
    slots = [sampler.slot(step, index) for step in (0, 499, 500) for index in (0, 2)]
    assert [slot.sample for slot in slots] == [788, 446, 580, 690, 575, 918]
    assert all(slot.draw == slot.sample for slot in slots)
    assert [slot.epoch for slot in slots] == [0, 0, 0, 0, 1, 1]


def test_mask_keys_are_those_of_earlier_versions() -> None:
    sampler = TrainSampler(samples=1000, global_batch=4, seed=3, repeats=2)
    keys = [sampler.mask_key(sampler.slot(step, index)) for step in (0, 500) for index in (0, 1)]
    assert keys == [-8427985370965756799, -1936100254172305614, 3137187371888546726, -654898691175435119]


def test_every_seed_epoch_draw_and_repeat_has_a_mask_key_of_its_own() -> None:
    keys = np.array(
        [
            TrainSampler(8, 1, seed).mask_key(Slot(epoch, draw, sample=0, repeat=repeat))
            for seed in range(6)
            for epoch in range(6)
            for draw in range(100)
            for repeat in range(3)
        ]
    )
    assert len(np.unique(keys)) == len(keys)
    bits = (keys[:, None] >> np.arange(64)) & 1
    assert np.abs(bits.mean(0) - 0.5).max() < 0.025  # 5 standard deviations
    for apart in (1, 3, 300, 1800):  # neighbours in repeat, draw, epoch, seed
        differing = (bits[apart:] != bits[:-apart]).mean(0)
        assert np.abs(differing - 0.5).max() < 0.027


def test_a_mask_key_depends_on_the_draw_and_not_on_the_sample() -> None:
    sampler = TrainSampler(8, 1, seed=0)
    assert sampler.mask_key(Slot(0, 3, sample=3, repeat=0)) == sampler.mask_key(
        Slot(0, 3, sample=5, repeat=0)
    )


def test_mask_keys_are_independent_of_the_draws_of_clips() -> None:
    """Compared with the first 64 bits of the generators in `params.py`, clip by clip."""
    sampler = TrainSampler(2000, 1, seed=0)
    keys = np.array([sampler.mask_key(Slot(0, draw, draw, repeat=0)) for draw in range(2000)]) / 2**64
    for rest in ([], [1]):
        first = [np.random.default_rng([0, 0, draw, *rest]).random() for draw in range(2000)]
        assert abs(np.corrcoef(keys, first)[0, 1]) < 0.11  # 5 standard deviations


@pytest.mark.parametrize(
    "ratios", [(3.0, 1.0), (1.0, 1.0, 1.0), (0.7, 0.2, 0.1), (1.0, 1000.0), (1e-3, 5.0, 2.0)]
)
def test_every_prefix_of_a_mixture_has_the_requested_shares(ratios: tuple[float, ...]) -> None:
    sampler = TrainSampler(50 * len(ratios), 8, seed=2, parts=tuple(Part(50, ratio) for ratio in ratios))
    shares = np.array(ratios) / sum(ratios)
    counts = np.zeros(len(ratios))
    for step in range(300):
        batch = np.bincount(
            [sampler.slot(step, index).sample // 50 for index in range(8)], minlength=len(ratios)
        )
        counts += batch
        assert np.abs(batch - 8 * shares).max() < len(ratios)
        assert np.abs(counts - 8 * (step + 1) * shares).max() < len(ratios)
    far = 10**15
    later = np.bincount(
        [sampler.slot(far + step, index).sample // 50 for step in range(250) for index in range(8)],
        minlength=len(ratios),
    )
    assert np.abs(later - 2000 * shares).max() < 2 * len(ratios)


def test_each_part_of_a_mixture_has_epochs_of_its_own() -> None:
    parts = (Part(5, 2.0), Part(30, 1.0))
    slots = stream(TrainSampler(35, 6, seed=0, parts=parts), 40)
    for first, part in ((0, parts[0]), (5, parts[1])):
        own = [slot for slot in slots if first <= slot.sample < first + part.samples]
        epochs = Counter(slot.epoch for slot in own)
        for epoch in range(len(own) // part.samples):
            assert epochs[epoch] == part.samples
            assert sorted(s.sample - first for s in own if s.epoch == epoch) == list(range(part.samples))
    assert all(slot.draw == slot.sample for slot in slots)


def test_parts_of_equal_length_have_other_permutations_and_reach_all_slots() -> None:
    sampler = TrainSampler(2000, 4, seed=0, parts=(Part(1000), Part(1000)))
    slots = stream(sampler, 500)
    one, two = ([slot.sample % 1000 for slot in slots if slot.sample // 1000 == part] for part in (0, 1))
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.15  # 4.7 standard deviations
    for index in range(4):
        share = np.mean([slot.sample < 1000 for slot in slots[index::4]])
        assert 0.4 < share < 0.6  # 4.5 standard deviations


def test_repeats_of_a_mixture_are_adjacent() -> None:
    slots = stream(TrainSampler(20, 8, seed=1, repeats=2, parts=(Part(10, 3.0), Part(10))), 20)
    for one, other in zip(slots[::2], slots[1::2], strict=True):
        assert (one.repeat, other.repeat) == (0, 1)
        assert (one.epoch, one.draw, one.sample) == (other.epoch, other.draw, other.sample)


def test_a_mixture_in_order_is_in_order() -> None:
    sampler = TrainSampler(6, 4, seed=1, shuffle=False, parts=(Part(2), Part(4)))
    assert [slot.sample for slot in stream(sampler, 2)] == [0, 1, 2, 3, 0, 1, 4, 5]


@pytest.mark.parametrize("shuffle", [True, False])
def test_equal_weights_show_every_sample_once_an_epoch(shuffle: bool) -> None:
    part = Part(1000, weights=Widths([0.1] * 1000))
    slots = stream(TrainSampler(1000, 10, seed=4, shuffle=shuffle, parts=(part,)), 500)
    for epoch in range(5):
        assert sorted(slot.sample for slot in slots if slot.epoch == epoch) == list(range(1000))


def test_a_weighted_epoch_draws_each_sample_by_its_weight() -> None:
    weights = np.random.default_rng(0).exponential(size=200) ** 2
    weights[50:60] = 0
    expected = weights / weights.sum() * 200
    sampler = TrainSampler(200, 8, seed=9, parts=(Part(200, weights=Widths(list(weights))),))
    slots = stream(sampler, 250)  # ten epochs
    for epoch in range(10):
        counts = np.bincount([s.sample for s in slots if s.epoch == epoch], minlength=200)
        assert (counts >= np.floor(expected)).all() and (counts <= np.ceil(expected)).all()
    total = np.bincount([slot.sample for slot in slots], minlength=200)
    # Independent epochs would differ by up to 4.5 standard deviations, 7 draws; these spread the rounding.
    assert np.abs(total - 10 * expected).max() < 3


def test_two_draws_of_one_sample_in_one_epoch_are_two_clips() -> None:
    sampler = TrainSampler(14, 7, seed=0, parts=(Part(4, weights=Widths([97, 1, 1, 1])), Part(10, 2.0)))
    slots = stream(sampler, 60)
    assert len({(slot.epoch, slot.draw) for slot in slots}) == len(slots)
    assert Counter((slot.epoch, slot.sample) for slot in slots).most_common(1)[0][1] >= 3


@pytest.mark.parametrize(
    "parts",
    [(), (Part(1, weights=Widths([0.3])),), (Part(1, 5.0), Part(1), Part(1, weights=Widths([2])))],
    ids=["plain", "weighted", "mixed"],
)
def test_datasets_of_single_samples_fill_batches_over_many_epochs(parts: tuple[Part, ...]) -> None:
    sampler = TrainSampler(max(1, len(parts)), 16, seed=0, parts=parts)
    slots = stream(sampler, 3)
    assert {slot.sample for slot in slots} == set(range(sampler.samples))
    assert len({(slot.sample, slot.epoch) for slot in slots}) == 48
    assert sampler.epoch_of(3) == 48 / sampler.samples


def test_a_sampler_can_be_pickled_and_rejects_invalid_arguments() -> None:
    sampler = TrainSampler(10, 4, seed=1, parts=(Part(4, 2.0), Part(6, weights=Widths([1, 2, 3, 4, 5, 6]))))
    slots = stream(sampler, 5)
    assert stream(pickle.loads(pickle.dumps(sampler)), 5) == slots
    with pytest.raises(ValueError, match="11 samples"):
        TrainSampler(11, 4, seed=1, parts=sampler.parts)
    with pytest.raises(ValueError, match="at least one sample"):
        Part(0)
    for ratio in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="ratio must be a number above 0"):
            Part(5, ratio)


@pytest.mark.parametrize(("samples", "batch", "ranks"), [(1, 4, 3), (12, 4, 3), (13, 4, 3), (50, 7, 2)])
def test_evaluation_has_every_video_once(samples: int, batch: int, ranks: int) -> None:
    sampler = ViewSampler(samples, batch, ranks)
    dealt = [
        sampler.sample(rank, number, index)
        for rank in range(ranks)
        for number in range(sampler.batches)
        for index in range(batch)
    ]
    assert sorted(sample for sample in dealt if sample >= 0) == list(range(samples))
    assert len(dealt) - samples < batch * ranks
