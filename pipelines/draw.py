"""Every random number that a clip will use, and how a video is seen in training and in evaluation.

Pure NumPy, no I/O. A training clip's numbers are a function of (seed, epoch, sample, repeat) and of the size
of its video; one draw holds for all frames of the clip.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import rand_augment
from .frames import train_indices

CROP_TRIES = 10


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
