"""Mixup, CutMix and random erasing of whole clips, after the other augmentation.

Two clips mix that are `repeats` slots apart in a group of `2 * repeats` consecutive slots of the global
batch. A micro-batch holds whole groups, and the random numbers follow from the clips' keys: a mixed clip is
the same on any number of ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipelines.augment.roi import Box

MIXING_STREAM = 0x6D6978  # sets these random numbers apart from others that are drawn from the same key
ERASING_STREAM = 0x657261
ERASED_AREA = (0.02, 1 / 3)  # share of the frame, Zhong et al. (2017)
ERASED_ASPECT = (0.3, 1 / 0.3)  # height / width
ERASING_TRIES = 10


@dataclass(frozen=True)
class MixingSpec:
    """How the clips of a batch are mixed and erased."""

    mixup: float = 0.0
    """Alpha of mixup (Zhang et al., 2017): the weight is drawn from Beta(alpha, alpha); 0 is none."""
    cutmix: float = 0.0
    """Alpha of CutMix (Yun et al., 2019); with mixup, each pair takes either with probability one half."""
    probability: float = 1.0
    """Probability that a pair is mixed."""
    erasing: float = 0.0
    """Probability that a box of a clip is erased (Zhong et al., 2017), in all frames alike."""

    @property
    def mixes(self) -> bool:
        return (self.mixup > 0 or self.cutmix > 0) and self.probability > 0


@dataclass(frozen=True)
class PairMix:
    """How two clips mix, each with the other."""

    weight: float
    """The share of a clip's own pixels, and of its own label."""
    box: Box | None
    """CutMix: the box that comes from the other clip; None is mixup."""


class MixedLabels(NamedTuple):
    """The second label of each clip of a mixed batch."""

    labels: Tensor
    """int64, (B,): the label of the clip that was mixed in; a clip's own label where none was."""
    weights: Tensor
    """float32, (B,): the share of a clip's own label, 1 where no clip was mixed in."""


def draw_pair_mix(spec: MixingSpec, key: int, height: int, width: int) -> PairMix | None:
    """How a pair of clips of `height` x `width` pixels mixes, or None. key: of its first clip."""
    rng = np.random.default_rng([MIXING_STREAM, key % 2**64])
    if rng.random() >= spec.probability:
        return None
    cuts = spec.cutmix > 0 and (spec.mixup == 0 or rng.random() < 0.5)
    alpha = spec.cutmix if cuts else spec.mixup
    weight = float(rng.beta(alpha, alpha))
    if not cuts:
        return PairMix(weight, None)
    # Equation 2 of CutMix: a box of sqrt(1 - weight) of each side, centred anywhere, clipped by the frame.
    # The weight is then the share of the pixels that were not replaced.
    rows, columns = height * np.sqrt(1 - weight), width * np.sqrt(1 - weight)
    middle, centre = rng.uniform(0, height), rng.uniform(0, width)
    top, bottom = (int(np.clip(middle + half, 0, height)) for half in (-rows / 2, rows / 2))
    left, right = (int(np.clip(centre + half, 0, width)) for half in (-columns / 2, columns / 2))
    return PairMix(1 - (bottom - top) * (right - left) / (height * width), Box(top, left, bottom, right))


def draw_erased_box(spec: MixingSpec, key: int, height: int, width: int) -> Box | None:
    """The box of a clip of `height` x `width` pixels that is erased, or None."""
    rng = np.random.default_rng([ERASING_STREAM, key % 2**64])
    if rng.random() >= spec.erasing:
        return None
    for _ in range(ERASING_TRIES):
        area = height * width * rng.uniform(*ERASED_AREA)
        aspect = np.exp(rng.uniform(*np.log(ERASED_ASPECT)))
        rows, columns = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if rows < height and columns < width:
            top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
            return Box(top, left, top + rows, left + columns)
    return None


def mix_clips(
    spec: MixingSpec, clips: Tensor, labels: Tensor, valid: Sequence[bool], keys: Sequence[int], repeats: int
) -> MixedLabels | None:
    """Erase and mix normalised clips (B, 3, T, H, W) in place. Returns the labels, or None without mixing.

    A placeholder (not valid) mixes with nothing, nor does its partner. An erased box is 0, the mean colour.

    Args:
        labels: int64, (B,), in host memory.
        repeats: clips of a sample, which are in consecutive slots.
    """
    height, width = clips.shape[-2:]
    for clip, key in zip(clips, keys, strict=True):
        box = draw_erased_box(spec, key, height, width)
        if box is not None:
            clip[..., box.top : box.bottom, box.left : box.right] = 0
    if not spec.mixes:
        return None
    mixed, weights = labels.clone(), torch.ones(len(labels))
    for group in range(0, len(clips), 2 * repeats):
        for first in range(group, group + repeats):
            second = first + repeats
            pair = draw_pair_mix(spec, keys[first], height, width)
            if pair is None or not (valid[first] and valid[second]):
                continue
            _mix_pair(clips[first], clips[second], pair)
            mixed[first], mixed[second] = labels[second], labels[first]
            weights[first] = weights[second] = pair.weight
    return MixedLabels(mixed, weights)


def _mix_pair(first: Tensor, second: Tensor, pair: PairMix) -> None:  # 3 T H W, 3 T H W
    """Mix each of two clips with the other, in place."""
    if pair.box is None:
        before = first.clone()
        first.lerp_(second, 1 - pair.weight)
        second.lerp_(before, 1 - pair.weight)
        return
    rows, columns = slice(pair.box.top, pair.box.bottom), slice(pair.box.left, pair.box.right)
    before = first[..., rows, columns].clone()
    first[..., rows, columns] = second[..., rows, columns]
    second[..., rows, columns] = before
