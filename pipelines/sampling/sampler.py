"""The samplers: which sample is in which slot of which global batch.

Pure functions without I/O. A batch is a function of (parts of the dataset, seed, step). World size, rank,
workers, prefetch and crashes do not change it, so the state of a run's data is one integer: the next step.
`augment/params.py` draws the augmentation parameters of a slot.

Training samples are one endless stream, cut into global batches. Without a mixture it is epoch after epoch,
each a new permutation of all samples. A batch may straddle two epochs: no epoch has a remainder, and each
shows every sample exactly once. A mixture has such a stream for each of its parts; every global batch takes
each part's share from that part's stream.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate
from math import isfinite, nextafter
from typing import Protocol

FEISTEL_ROUNDS = 8
# Constants that make the keys of different draws differ: the permutations of the first part's epochs (later
# parts count up from there), the slots of a global batch, the offsets of weighted epochs, the dropout masks.
PERMUTATION_STREAM = 0x7065726D
SLOT_STREAM = 0x706C6163650000
OFFSET_STREAM = 0x6F66667365740000
MASK_STREAM = 0x6D61736B0000

GOLDEN_RATIO = 0x9E3779B97F4A7C15  # its fractional part times 2**64


class SampleWeights(Protocol):
    """The weights of samples as intervals, one after another; implemented by `Manifest`."""

    total_weight: float

    def row_at_weight(self, weight: float) -> int:
        """The sample whose interval contains `weight`, 0 <= weight < total_weight."""


@dataclass(frozen=True)
class Part:
    """A part of a mixture."""

    samples: int
    ratio: float = 1.0
    """Its share of the draws, relative to the other parts' ratios."""
    weights: SampleWeights | None = None
    """How often each sample is drawn; None is all equally often."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError("a part needs at least one sample")
        if not (self.ratio > 0 and isfinite(self.ratio)):
            raise ValueError(f"a part's ratio must be a number above 0, not {self.ratio}")


@dataclass(frozen=True)
class Slot:
    """The content of a slot of a global batch."""

    epoch: int
    """Of the part that the sample belongs to."""
    draw: int
    """Key of the clip's random numbers, with seed, epoch and repeat. It is the sample itself where an epoch
    shows each once; where weights repeat a sample in an epoch, each draw has a number of its own."""
    sample: int
    repeat: int


def permute(index: int, samples: int, seed: int, epoch: int, stream: int = PERMUTATION_STREAM) -> int:
    """The value at `index` of the epoch's permutation of `range(samples)`; each stream has its own.

    A keyed bijection: a Feistel network over the next even number of bits, applied until the value is inside
    the range, which takes fewer than four applications on average. O(1) memory for any `samples`.
    """
    half_bits = max(1, ((samples - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    keys = _round_keys(seed ^ stream, epoch)
    value = index
    while True:
        left, right = value >> half_bits, value & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        value = (left << half_bits) | right
        if value < samples:
            return value


def _round_keys(key: int, epoch: int) -> list[int]:
    base = _mix(_mix(key) ^ epoch)
    return [_mix(base + round_index) for round_index in range(FEISTEL_ROUNDS)]


def _mix(value: int) -> int:
    """A 64-bit finaliser (SplitMix64): every input bit flips every output bit with probability near 1/2."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)


@dataclass(frozen=True)
class TrainSampler:
    """The endless training stream, cut into global batches.

    An epoch, as `epoch_of` counts, is as many draws as the dataset has samples. With a single part it shows
    every sample once, or with weights as often as its weight asks for, rounded up or down. In a mixture every
    part has epochs of its own: a part with few samples and a large ratio has several in the time of one.
    """

    samples: int
    """Rows of the dataset."""
    global_batch: int
    """Clips per optimiser step over all ranks, repeats included."""
    seed: int
    repeats: int = 1
    """Clips made from each sample, in consecutive slots of the same global batch (Hoffer et al.)."""
    shuffle: bool = True
    """False keeps the dataset's order in every epoch."""
    parts: tuple[Part, ...] = ()
    """Of the dataset, in its order; empty is a single part with equal weights. Every global batch holds each
    part's share up to rounding; the rounding errors do not add up."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError("a sampler needs at least one sample")
        if self.global_batch % self.repeats:
            raise ValueError(f"global batch {self.global_batch} is not a multiple of {self.repeats} repeats")
        if self.parts and sum(part.samples for part in self.parts) != self.samples:
            raise ValueError(f"the parts have not {self.samples} samples in total")

    @property
    def samples_per_step(self) -> int:
        return self.global_batch // self.repeats

    @property
    def steps_per_epoch(self) -> float:
        """Optimiser steps with as many draws as there are samples; not an integer in general."""
        return self.samples / self.samples_per_step

    def epoch_of(self, step: int) -> float:
        """Epochs before `step`."""
        return step * self.samples_per_step / self.samples

    def slot(self, step: int, index: int) -> Slot:
        """Slot `index` (0 <= index < global_batch) of the global batch of `step`."""
        part, earlier = self._part_of(step, index // self.repeats)
        epoch, draw, sample = self._draw(part, earlier)
        return Slot(epoch, draw, sample, index % self.repeats)

    def mask_key(self, slot: Slot) -> int:
        """The key of a clip's dropout and drop-path masks in the model, an int64.

        A hash of (seed, epoch, draw, repeat), independent of what else is drawn from them.
        """
        key = self.seed ^ MASK_STREAM
        for number in (slot.epoch, slot.draw, slot.repeat):
            key = _mix(key) ^ number
        key = _mix(key)
        return key - 2**64 if key >= 2**63 else key

    @cached_property
    def _parts(self) -> tuple[Part, ...]:
        return self.parts or (Part(self.samples),)

    @cached_property
    def _first_samples(self) -> list[int]:
        return list(accumulate((part.samples for part in self._parts), initial=0))

    @cached_property
    def _shares(self) -> list[Fraction]:
        """For each part, its share of what the parts before it leave over."""
        ratios = [Fraction(part.ratio) for part in self._parts]
        return [ratio / sum(ratios[number:]) for number, ratio in enumerate(ratios)]

    def _part_of(self, step: int, index: int) -> tuple[int, int]:
        """The part of sample `index` (0 <= index < samples_per_step) of a step, and how many draws it had."""
        size = self.samples_per_step
        if len(self._parts) == 1:
            return 0, step * size + index
        if self.shuffle:
            # In order, the same part would be in the same rank's micro-batch in every step.
            index = permute(index, size, self.seed, step, SLOT_STREAM)
        for part, (begin, end) in enumerate(
            zip(self._draws_before(step * size), self._draws_before((step + 1) * size), strict=True)
        ):
            if index < end - begin:
                return part, begin + index
            index -= end - begin
        raise AssertionError("the parts' shares of a batch do not add up to it")

    def _draws_before(self, draws: int) -> Iterator[int]:
        """For each part, how many of the first `draws` draws it has.

        A part takes its share, rounded, of what the parts before it leave over. So its count differs from its
        exact share by less than the number of parts, however long the stream is, and never decreases.
        """
        for share in self._shares:
            count = (2 * draws * share.numerator + share.denominator) // (2 * share.denominator)
            yield count
            draws -= count

    def _draw(self, number: int, earlier: int) -> tuple[int, int, int]:
        """Epoch, draw and sample of a part's draw number `earlier`, counted from 0."""
        part, first = self._parts[number], self._first_samples[number]
        epoch, index = divmod(earlier, part.samples)
        if self.shuffle:
            index = permute(index, part.samples, self.seed, epoch, PERMUTATION_STREAM + number)
        if part.weights is None:
            return epoch, first + index, first + index
        offset = _offset(self.seed ^ (OFFSET_STREAM + number), epoch)
        total = part.weights.total_weight
        point = min((index + offset) * (total / part.samples), nextafter(total, 0))
        return epoch, first + index, first + part.weights.row_at_weight(point)


def _offset(key: int, epoch: int) -> float:
    """The first of the evenly spaced points of a weighted epoch, 0 < offset < 1, in units of their distance.

    A sample is drawn once for each point in its interval: its weight over the distance, rounded up or down; a
    sample lighter than the distance is drawn in some epochs only. Adding the golden ratio from epoch to epoch
    spreads these epochs evenly. The offset stays half a millionth away from 0 and 1, more than the rounding
    error of a sum of many weights, so that equal weights draw every sample once.
    """
    phase = _mix(key) + epoch * GOLDEN_RATIO
    return ((phase >> 44 & 0xFFFFF) + 0.5) / 2**20


@dataclass(frozen=True)
class ViewSampler:
    """Every sample once, distributed over the ranks round-robin; the slots left over hold -1.

    All ranks have the same number of batches, because a partitioned model needs all of them in every forward.
    """

    samples: int
    batch: int
    world_size: int

    @property
    def batches(self) -> int:
        """Batches per rank."""
        return -(-self.samples // (self.batch * self.world_size))

    def sample(self, rank: int, batch: int, index: int) -> int:
        """The sample in slot `index` of the rank's batch, or -1."""
        position = (batch * self.batch + index) * self.world_size + rank
        return position if position < self.samples else -1
