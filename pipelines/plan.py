"""The heart of the pipeline: which sample stands where in which global batch.

Pure, no I/O. A batch is a function of (samples, seed, step). World size, rank, worker, prefetch and crash
change nothing in it, so the state of a run's data is one integer: the next step. What is done to a sample
once it stands somewhere is drawn in `draw.py`.

Training order is one endless stream: epoch after epoch, each a fresh permutation of all samples, cut into
global batches. A batch may straddle two epochs; no epoch has a tail, each shows every sample exactly once.
"""

from dataclasses import dataclass

FEISTEL_ROUNDS = 8
PERMUTATION_STREAM = 0x7065726D  # keeps the keys of permutations apart from the draws of clips


@dataclass(frozen=True)
class Slot:
    """One place in a global batch."""

    epoch: int
    sample: int
    repeat: int


def permute(index: int, samples: int, seed: int, epoch: int) -> int:
    """Where `index` goes in the epoch's permutation of `range(samples)`.

    A keyed bijection (a Feistel network over the next even number of bits, walked until it lands inside the
    range: under four rounds of walking on average), so it needs no array: O(1) memory for any `samples`.
    """
    half_bits = max(1, ((samples - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    keys = _round_keys(seed, epoch)
    value = index
    while True:
        left, right = value >> half_bits, value & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        value = (left << half_bits) | right
        if value < samples:
            return value


def _round_keys(seed: int, epoch: int) -> list[int]:
    base = _mix(_mix(seed ^ PERMUTATION_STREAM) ^ epoch)
    return [_mix(base + round_index) for round_index in range(FEISTEL_ROUNDS)]


def _mix(value: int) -> int:
    """A 64-bit finaliser: every input bit changes every output bit with a chance near one half."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)


@dataclass(frozen=True)
class TrainPlan:
    """The endless training stream, cut into global batches.

    samples: rows of the manifest. global_batch: clips per optimiser step over all ranks, repeats included.
    repeats: clips made from each sample, side by side in the same global batch (Hoffer et al.).
    shuffle: False keeps the manifest's order in every epoch.
    """

    samples: int
    global_batch: int
    seed: int
    repeats: int = 1
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError("a plan needs at least one sample")
        if self.global_batch % self.repeats:
            raise ValueError(f"global batch {self.global_batch} is no multiple of {self.repeats} repeats")

    @property
    def samples_per_step(self) -> int:
        return self.global_batch // self.repeats

    @property
    def steps_per_epoch(self) -> float:
        """Optimiser steps that show every sample once; not a whole number in general."""
        return self.samples / self.samples_per_step

    def epoch_of(self, step: int) -> float:
        """How many epochs are done before `step`."""
        return step * self.samples_per_step / self.samples

    def slot(self, step: int, place: int) -> Slot:
        """Who stands at `place` (0 <= place < global_batch) of the global batch of `step`."""
        position = step * self.samples_per_step + place // self.repeats
        epoch, index = divmod(position, self.samples)
        sample = permute(index, self.samples, self.seed, epoch) if self.shuffle else index
        return Slot(epoch, sample, place % self.repeats)


@dataclass(frozen=True)
class ViewPlan:
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
