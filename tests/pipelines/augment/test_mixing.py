"""Mixup, CutMix and random erasing: the arithmetic, the distributions, and the same clips on any layout."""

import numpy as np
import pytest
import torch
from scipy import stats

from pipelines.augment.mixing import MixingSpec, draw_erased_box, draw_pair_mix, mix_clips
from tests.conftest import MotionSet
from tests.pipelines.batches import ALL, digests, loader, take

LABELS = torch.tensor([4, 7, 1, -1])
KEYS = [11, -12, 13, 14]


def numbered_clips() -> torch.Tensor:
    """Four clips, each of one value: 1, 2, 3 and 4."""
    return torch.arange(1.0, 5).view(4, 1, 1, 1, 1).expand(4, 3, 2, 8, 10).clone()


def test_mixup_averages_pairs_and_weighs_their_labels_alike() -> None:
    clips, spec = numbered_clips(), MixingSpec(mixup=0.8)
    mixed = mix_clips(spec, clips, LABELS, [True, True, True, False], KEYS, repeats=1)
    assert mixed is not None
    weight = float(mixed.weights[0])
    assert 0 < weight < 1
    torch.testing.assert_close(clips[0], torch.full_like(clips[0], weight * 1 + (1 - weight) * 2))
    torch.testing.assert_close(clips[1], torch.full_like(clips[1], weight * 2 + (1 - weight) * 1))
    assert mixed.labels.tolist() == [7, 4, 1, -1]
    assert mixed.weights.tolist() == [mixed.weights[0], mixed.weights[0], 1, 1]
    assert torch.equal(clips[2:], numbered_clips()[2:]), "a placeholder and its partner are left as they are"


def test_cutmix_exchanges_a_box_and_weighs_labels_by_its_area() -> None:
    clips, spec = numbered_clips(), MixingSpec(cutmix=1.0)
    mixed = mix_clips(spec, clips, LABELS, [True] * 4, KEYS, repeats=1)
    assert mixed is not None
    for first in (0, 2):
        pair = draw_pair_mix(spec, KEYS[first], 8, 10)
        assert pair is not None and pair.box is not None
        inside = torch.zeros(8, 10, dtype=torch.bool)
        inside[pair.box.top : pair.box.bottom, pair.box.left : pair.box.right] = True
        for own, other in ((first, first + 1), (first + 1, first)):
            expected = torch.where(inside, other + 1.0, own + 1.0).expand(3, 2, 8, 10)
            assert torch.equal(clips[own], expected)
            assert float(mixed.weights[own]) == pytest.approx(1 - inside.double().mean().item())


def test_repeats_of_a_sample_do_not_mix_with_each_other() -> None:
    clips, spec = numbered_clips(), MixingSpec(mixup=0.8)
    mixed = mix_clips(spec, clips, torch.tensor([4, 4, 7, 7]), [True] * 4, KEYS, repeats=2)
    assert mixed is not None and mixed.labels.tolist() == [7, 7, 4, 4]


def test_weights_are_beta_distributed_and_both_kinds_are_drawn() -> None:
    both = [
        draw_pair_mix(MixingSpec(mixup=0.3, cutmix=1.0, probability=0.8), key, 224, 224)
        for key in range(3000)
    ]
    drawn = [pair for pair in both if pair is not None]
    weights = [pair.weight for pair in drawn if pair.box is None]
    # Counts within five standard deviations; a Kolmogorov-Smirnov test that fails once in a thousand.
    assert abs(len(drawn) - 2400) < 5 * np.sqrt(3000 * 0.8 * 0.2)
    assert abs(len(weights) - len(drawn) / 2) < 5 * np.sqrt(len(drawn)) / 2
    assert stats.kstest(weights, stats.beta(0.3, 0.3).cdf).pvalue > 1e-3


def test_erased_boxes_have_the_published_sizes() -> None:
    boxes = [draw_erased_box(MixingSpec(erasing=0.25), key, 224, 200) for key in range(2000)]
    drawn = [box for box in boxes if box is not None]
    assert abs(len(drawn) - 500) < 5 * np.sqrt(2000 * 0.25 * 0.75)
    for box in drawn:
        rows, columns = box.size
        assert 0 <= box.top < box.bottom <= 224 and 0 <= box.left < box.right <= 200
        assert 0.018 < rows * columns / (224 * 200) < 0.34  # rounded to pixels
        assert 0.28 < rows / columns < 3.5
    clips, spec = numbered_clips(), MixingSpec(erasing=1.0)
    assert mix_clips(spec, clips, LABELS, [True] * 4, KEYS, repeats=1) is None, "labels stay"
    for clip, key, value in zip(clips, KEYS, (1.0, 2.0, 3.0, 4.0), strict=True):
        box = draw_erased_box(spec, key, 8, 10)
        assert box is not None
        assert int((clip == 0).sum()) == 3 * 2 * box.size[0] * box.size[1] and clip.max() == value


@pytest.mark.parametrize("repeats", [1, 2])
def test_mixed_clips_do_not_depend_on_micro_batches_and_ranks(motion_set: MotionSet, repeats: int) -> None:
    spec = MixingSpec(mixup=0.8, cutmix=1.0, erasing=0.25)
    whole = take(loader(motion_set.train, ALL, batch=8, repeats=repeats, mixing=spec), 2)
    plain = take(loader(motion_set.train, ALL, batch=8, repeats=repeats), 2)
    assert digests(whole) != digests(plain)
    ranks = [
        take(
            loader(motion_set.train, ALL, batch=8, micro=4, rank=rank, ranks=2, repeats=repeats, mixing=spec),
            2,
        )
        for rank in (0, 1)
    ]
    divided = list(zip(*ranks, strict=True))
    assert digests(whole) == digests(divided)
    for batch, parts in zip(whole, divided, strict=True):
        labels = [part.mixed.labels for part in parts if part.mixed is not None]
        weights = [part.mixed.weights for part in parts if part.mixed is not None]
        assert batch.mixed is not None
        assert torch.equal(batch.mixed.labels, torch.cat(labels))
        assert torch.equal(batch.mixed.weights, torch.cat(weights))


def test_a_micro_batch_that_divides_a_pair_is_refused(motion_set: MotionSet) -> None:
    with pytest.raises(ValueError, match="micro-batch of 2 divides"):
        loader(motion_set.train, ALL, batch=8, micro=2, repeats=2, mixing=MixingSpec(cutmix=1.0))
