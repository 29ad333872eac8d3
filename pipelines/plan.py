"""The heart of the pipeline: which sample stands where, and every random number it will use.

Pure NumPy, no I/O. A batch is a function of (samples, seed, step); a clip's random numbers are a function of
(seed, epoch, sample, repeat). World size, rank, worker, prefetch and crash change nothing in either, so the
state of a run's data is one integer: the next step.

Training order is one endless stream: epoch after epoch, each a fresh permutation of all samples, cut into
global batches. A batch may straddle two epochs; no epoch has a tail, each shows every sample exactly once.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import rand_augment
from .frames import train_indices

FEISTEL_ROUNDS = 8
PERMUTATION_STREAM = 0x7065726D  # keeps the keys of permutations apart from the draws of clips
CROP_TRIES = 10


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
class TrainClip:
    """How a training clip is cut out of its video and changed; one draw holds for all its frames.

    frames: T. size: side of the square crop in pixels. crop_scale: least and most share of the frame's area.
    crop_ratio: least and most width/height. flip: chance of a mirrored clip. color_jitter: brightness,
    contrast and saturation factors come from [1 - j, 1 + j]. rand_augment: None, or a string such as
    `rand-m7-n4-mstd0.5-inc1`.
    """

    frames: int
    size: int
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    color_jitter: float = 0.0
    rand_augment: str | None = None

    @property
    def operations(self) -> int:
        """How many RandAugment operations a clip goes through."""
        return rand_augment.parse(self.rand_augment).count if self.rand_augment else 0


@dataclass(frozen=True)
class ClipDraw:
    """Every number that one training clip needs.

    indices: (T,) frame numbers. crop: top, left, bottom, right in pixels. flip: 0 or 1. jitter: factors of
    brightness, contrast, saturation. operations: (N,) codes of `rand_augment`; arguments: (N, 6) theirs.
    """

    indices: NDArray[np.int32]
    crop: NDArray[np.float32]
    flip: int
    jitter: NDArray[np.float32]
    operations: NDArray[np.int32]
    arguments: NDArray[np.float32]


def draw_clip(
    spec: TrainClip, *, seed: int, epoch: int, sample: int, repeat: int, frames: int, height: int, width: int
) -> ClipDraw:
    """Draw a training clip from a video of `frames` frames of `height` x `width` pixels.

    Repeats of one sample share their frames and nothing else.
    """
    indices = train_indices(frames, spec.frames, np.random.default_rng([seed, epoch, sample]))
    rng = np.random.default_rng([seed, epoch, sample, 1 + repeat])
    crop = inception_crop(rng, height, width, spec.crop_scale, spec.crop_ratio)
    flip = int(rng.random() < spec.flip)
    jitter = rng.uniform(max(0.0, 1 - spec.color_jitter), 1 + spec.color_jitter, size=3).astype(np.float32)
    if spec.rand_augment:
        policy = rand_augment.parse(spec.rand_augment)
        operations, arguments = rand_augment.draw(policy, rng, height, width)
    else:
        operations, arguments = rand_augment.nothing()
    return ClipDraw(indices, crop, flip, jitter, operations, arguments)


def inception_crop(
    rng: np.random.Generator,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> NDArray[np.float32]:
    """The random resized crop of Szegedy et al.: ten tries, then the largest centred crop of allowed ratio.

    Returns top, left, bottom, right in whole pixels, as float32.
    """
    log_ratio = np.log(ratio)
    for _ in range(CROP_TRIES):
        area = height * width * rng.uniform(*scale)
        aspect = np.exp(rng.uniform(*log_ratio))
        crop_width, crop_height = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(0, height - crop_height, endpoint=True))
            left = int(rng.integers(0, width - crop_width, endpoint=True))
            break
    else:
        aspect = min(max(width / height, ratio[0]), ratio[1])
        crop_width = min(width, round(height * aspect))
        crop_height = min(height, round(width / aspect))
        top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return np.array([top, left, top + crop_height, left + crop_width], np.float32)


@dataclass(frozen=True)
class ViewClip:
    """How a video is seen in evaluation: `clips` x `crops` views from one decode.

    frames: T of each clip. size: side of the square crops, to which the short side is resized. crops: 1
    (centre) or 3 (left, centre, right; top, centre, bottom for upright videos).
    """

    frames: int
    size: int
    clips: int = 1
    crops: int = 1

    @property
    def views(self) -> int:
        return self.clips * self.crops


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
