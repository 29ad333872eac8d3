"""The heart of the pipeline: which sample stands where in which global batch.

Pure, no I/O. A batch is a function of (parts of the dataset, seed, step). World size, rank, worker, prefetch
and crash change nothing in it, so the state of a run's data is one integer: the next step. What is done to a
sample once it stands somewhere is drawn in `augment/params.py`.

Training order is one endless stream, cut into global batches. Without mixing it is epoch after epoch, each a
fresh permutation of all samples; a batch may straddle two epochs, no epoch has a tail, each shows every
sample exactly once. A mixture has such a stream for each of its parts, and deals every global batch its share
of their next draws.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate
from math import isfinite, nextafter
from typing import Protocol

FEISTEL_ROUNDS = 8
# These keep the keys of different draws apart: the epochs of a dataset or its first part (later parts count
# up from there), the places in a global batch, the offsets of weighted epochs, the masks of clips.
PERMUTATION_STREAM = 0x7065726D
PLACE_STREAM = 0x706C6163650000
OFFSET_STREAM = 0x6F66667365740000
MASK_STREAM = 0x6D61736B0000

GOLDEN_TURN = 0x9E3779B97F4A7C15  # the golden ratio's fraction of a full turn of 2**64


class SampleWeights(Protocol):
    """Samples laid side by side, each as wide as its weight; a `Manifest` is such."""

    total_weight: float

    def row_at_weight(self, weight: float) -> int:
        """The sample that lies at `weight`, 0 <= weight < total_weight."""


@dataclass(frozen=True)
class Part:
    """A part of a dataset, and how often it is drawn from.

    samples: how many it has. ratio: its share, compared with the other parts' ratios. weights: how often each
    of its samples comes; None is all equally often.
    """

    samples: int
    ratio: float = 1.0
    weights: SampleWeights | None = None

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError("a part needs at least one sample")
        if not (self.ratio > 0 and isfinite(self.ratio)):
            raise ValueError(f"a part's ratio must be a number above 0, not {self.ratio}")


@dataclass(frozen=True)
class Slot:
    """One place in a global batch.

    epoch: of the part that the sample belongs to. draw: what the clip's random numbers are keyed with, beside
    seed, epoch and repeat. It is the sample itself where an epoch shows each once; where weights make a
    sample come several times in an epoch, each time has a number of its own.
    """

    epoch: int
    draw: int
    sample: int
    repeat: int


def permute(index: int, samples: int, seed: int, epoch: int, stream: int = PERMUTATION_STREAM) -> int:
    """Where `index` goes in the epoch's permutation of `range(samples)`; each stream has its own.

    A keyed bijection (a Feistel network over the next even number of bits, walked until it lands inside the
    range: under four rounds of walking on average), so it needs no array: O(1) memory for any `samples`.
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
    """A 64-bit finaliser: every input bit changes every output bit with a chance near one half."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)


@dataclass(frozen=True)
class TrainSampler:
    """The endless training stream, cut into global batches.

    samples: rows of the dataset. global_batch: clips per optimiser step over all ranks, repeats included.
    repeats: clips made from each sample, side by side in the same global batch (Hoffer et al.).
    shuffle: False keeps the dataset's order in every epoch.
    parts: what the dataset consists of, in its order; none given is one, all samples equally often. Every
    global batch holds each part's share of it up to rounding, and later batches make up for the rounding.

    An epoch, as `epoch_of` counts, is as many draws as the dataset has samples. Of a single part it shows
    every sample once, or with weights each as often as its weight says, rounded up or down. In a mixture
    every part goes through epochs of its own: one with few samples and a great ratio through several in the
    time of one.
    """

    samples: int
    global_batch: int
    seed: int
    repeats: int = 1
    shuffle: bool = True
    parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError("a plan needs at least one sample")
        if self.global_batch % self.repeats:
            raise ValueError(f"global batch {self.global_batch} is no multiple of {self.repeats} repeats")
        if self.parts and sum(part.samples for part in self.parts) != self.samples:
            raise ValueError(f"the parts have other than {self.samples} samples in all")

    @property
    def samples_per_step(self) -> int:
        return self.global_batch // self.repeats

    @property
    def steps_per_epoch(self) -> float:
        """Optimiser steps that draw as often as there are samples; not a whole number in general."""
        return self.samples / self.samples_per_step

    def epoch_of(self, step: int) -> float:
        """How many epochs are done before `step`."""
        return step * self.samples_per_step / self.samples

    def slot(self, step: int, place: int) -> Slot:
        """Who stands at `place` (0 <= place < global_batch) of the global batch of `step`."""
        part, earlier = self._turn(step, place // self.repeats)
        epoch, draw, sample = self._draw(part, earlier)
        return Slot(epoch, draw, sample, place % self.repeats)

    def mask_key(self, slot: Slot) -> int:
        """What the model's dropout and drop-path masks of a clip are keyed with, an int64.

        A hash of (seed, epoch, draw, repeat), apart from whatever else is drawn from them here and in
        `augment/params.py`.
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
        """For each part, its share of what the parts before it leave."""
        ratios = [Fraction(part.ratio) for part in self._parts]
        return [ratio / sum(ratios[number:]) for number, ratio in enumerate(ratios)]

    def _turn(self, step: int, place: int) -> tuple[int, int]:
        """Whose turn it is at `place` (0 <= place < samples_per_step), and how often it was before."""
        size = self.samples_per_step
        if len(self._parts) == 1:
            return 0, step * size + place
        if self.shuffle:
            # Dealt in order, the same part would meet the same rank, and the same micro-batch, in every step.
            place = permute(place, size, self.seed, step, PLACE_STREAM)
        for part, (begin, end) in enumerate(
            zip(self._dealt(step * size), self._dealt((step + 1) * size), strict=True)
        ):
            if place < end - begin:
                return part, begin + place
            place -= end - begin
        raise AssertionError("the parts' shares of a batch do not add up to it")

    def _dealt(self, draws: int) -> Iterator[int]:
        """How many of the first `draws` draws are each part's.

        A part takes its share of what those before it leave, rounded. So its count strays from what the
        ratios say by less than the number of parts, however long the stream is, and never goes down.
        """
        for share in self._shares:
            count = (2 * draws * share.numerator + share.denominator) // (2 * share.denominator)
            yield count
            draws -= count

    def _draw(self, number: int, earlier: int) -> tuple[int, int, int]:
        """Epoch, draw and sample of a part's draw after `earlier` ones."""
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
    """Where the evenly spaced points of a weighted epoch begin, 0 < offset < 1, in steps from point to point.

    A sample is drawn where a point falls on it: as often as its width holds steps, rounded up or down, and
    one of less than a step in some epochs only. Turning by the golden ratio from epoch to epoch spreads these
    epochs evenly. The offset keeps half a millionth away from 0 and 1, more than what sums of many weights
    lose to rounding, so that equal weights do draw every sample once.
    """
    turn = _mix(key) + epoch * GOLDEN_TURN
    return ((turn >> 44 & 0xFFFFF) + 0.5) / 2**20


@dataclass(frozen=True)
class ViewSampler:
    """Every sample once, dealt to the ranks in turn; the places left over hold -1.

    All ranks make the same number of batches, because a partitioned model needs all of them in every forward.
    """

    samples: int
    batch: int
    world_size: int

    @property
    def batches(self) -> int:
        """Batches per rank."""
        return -(-self.samples // (self.batch * self.world_size))

    def sample(self, rank: int, batch: int, place: int) -> int:
        """The sample at `place` of the rank's batch, or -1."""
        position = (batch * self.batch + place) * self.world_size + rank
        return position if position < self.samples else -1
