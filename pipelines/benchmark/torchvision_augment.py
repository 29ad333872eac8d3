"""The augmentation of a training clip with torchvision, as fast as its operations allow on a CPU.

Clips are uint8, (T, 3, H, W). One draw holds for all frames of a clip. What was found fastest: RandAugment's
operations each in the memory layout they like best (autocontrast in channels-last takes four times as long,
sharpening in channels-first ten times); warping frames less the fill colour, because torchvision's own `fill`
warps a mask beside them; cropping before anything becomes floating point.
"""

import math
import random
from collections.abc import Callable

import numpy as np
import torch
from torchvision.transforms import InterpolationMode  # type: ignore[import-untyped]
from torchvision.transforms.v2 import functional as F  # type: ignore[import-untyped]

from pipelines.augment.rand_augment import MAX_MAGNITUDE, Policy, draw_magnitude
from pipelines.benchmark.workload import CROP_RATIO, CROP_SCALE, FLIP, MEAN, STD

FILL = 128  # grey: what comes in from outside the frame
LINEAR = InterpolationMode.BILINEAR

# Of a clip, by a level, 1 at magnitude 10 and above it where a policy allows more, towards a sign.
ClipOperation = Callable[[torch.Tensor, float, int], torch.Tensor]


def augment(clip: torch.Tensor, policy: Policy, rng: np.random.Generator) -> torch.Tensor:
    """RandAugment on full frames, with the operations of `rand_augment.draw_operations` for this `rng`."""
    for choice in rng.integers(0, len(OPERATIONS), size=policy.count):
        fires = rng.random() < policy.probability
        level = draw_magnitude(policy, rng) / MAX_MAGNITUDE
        sign = 1 if rng.random() < 0.5 else -1
        if fires:
            clip = OPERATIONS[choice](clip, level, sign)
    return clip


def crop_and_normalise(clip: torch.Tensor, size: int) -> torch.Tensor:
    """Random resized crop to `size` x `size`, flip, normalisation; returns float32, (3, T, size, size)."""
    top, left, height, width = draw_crop(clip.shape[-2], clip.shape[-1])
    # Resizing uint8 in channels-last is three times as fast as in channels-first.
    packed = clip.contiguous(memory_format=torch.channels_last)
    cut = F.resized_crop(packed, top, left, height, width, [size, size], LINEAR, antialias=False)
    if random.random() < FLIP:
        cut = F.horizontal_flip(cut)
    frames_first = cut.transpose(0, 1)  # 3 T size size
    pixels = torch.empty(frames_first.shape, dtype=torch.float32).copy_(frames_first)
    return pixels.sub_(255 * MEAN).mul_(1 / (255 * STD))


def draw_crop(height: int, width: int) -> tuple[int, int, int, int]:
    """The random resized crop: top, left, height, width; ten tries, then the middle at the nearest ratio."""
    for _ in range(10):
        area = height * width * random.uniform(*CROP_SCALE)
        ratio = math.exp(random.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        cut_width, cut_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < cut_width <= width and 0 < cut_height <= height:
            top, left = random.randint(0, height - cut_height), random.randint(0, width - cut_width)
            return top, left, cut_height, cut_width
    ratio = min(max(width / height, CROP_RATIO[0]), CROP_RATIO[1])
    cut_width, cut_height = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (height - cut_height) // 2, (width - cut_width) // 2, cut_height, cut_width


def _auto_contrast(clip: torch.Tensor, level: float, sign: int) -> torch.Tensor:
    return F.autocontrast(clip.contiguous())


def _equalize(clip: torch.Tensor, level: float, sign: int) -> torch.Tensor:
    return F.equalize(clip)


def _invert(clip: torch.Tensor, level: float, sign: int) -> torch.Tensor:
    return F.invert(clip)


def _warp(clip: torch.Tensor, angle: float, shear: list[float], about: list[float] | None) -> torch.Tensor:
    shifted = clip.contiguous().to(torch.float32).sub_(FILL)
    warped = F.affine(shifted, angle, [0, 0], 1.0, shear, LINEAR, center=about)
    return warped.add_(FILL).round_().to(torch.uint8)


def _rotate(clip: torch.Tensor, level: float, sign: int) -> torch.Tensor:
    return _warp(clip, sign * level * 30, [0.0, 0.0], None)


def _shear_x(clip: torch.Tensor, level: float, sign: int) -> torch.Tensor:
    return _warp(clip, 0.0, [math.degrees(math.atan(sign * level * 0.3)), 0.0], [0.0, 0.0])


def _shear_y(clip: torch.Tensor, level: float, sign: int) -> torch.Tensor:
    return _warp(clip, 0.0, [0.0, math.degrees(math.atan(sign * level * 0.3))], [0.0, 0.0])


def _posterize(clip: torch.Tensor, level: float, sign: int) -> torch.Tensor:
    return F.posterize(clip, max(0, 4 - int(level * 4)))


def _solarize(clip: torch.Tensor, level: float, sign: int) -> torch.Tensor:
    # Twice as fast as F.solarize.
    return clip ^ (clip >= 256 - min(256, int(level * 256))).to(torch.uint8).mul_(255)


def _solarize_add(clip: torch.Tensor, level: float, sign: int) -> torch.Tensor:
    added = min(128, int(level * 110))
    return torch.where(clip < 128, clip.clamp(max=255 - added) + added, clip)


def _factor(level: float, sign: int) -> float:
    return max(0.1, 1 + sign * level * 0.9)


def _color(clip: torch.Tensor, level: float, sign: int) -> torch.Tensor:
    return F.adjust_saturation(clip.contiguous(), _factor(level, sign))


def _contrast(clip: torch.Tensor, level: float, sign: int) -> torch.Tensor:
    return F.adjust_contrast(clip, _factor(level, sign))


def _brightness(clip: torch.Tensor, level: float, sign: int) -> torch.Tensor:
    return F.adjust_brightness(clip, _factor(level, sign))


def _sharpness(clip: torch.Tensor, level: float, sign: int) -> torch.Tensor:
    return F.adjust_sharpness(clip.contiguous(memory_format=torch.channels_last), _factor(level, sign))


def _translate_x(clip: torch.Tensor, level: float, sign: int) -> torch.Tensor:
    return _translate(clip, 3, round(sign * level * 0.45 * clip.shape[3]))


def _translate_y(clip: torch.Tensor, level: float, sign: int) -> torch.Tensor:
    return _translate(clip, 2, round(sign * level * 0.45 * clip.shape[2]))


def _translate(clip: torch.Tensor, axis: int, offset: int) -> torch.Tensor:
    """Shift by whole pixels with one copy; as a warp it would take ten times as long."""
    size = clip.shape[axis]
    offset = max(-size, min(offset, size))  # further out there is no picture left either
    kept = size - abs(offset)
    shifted = torch.full_like(clip, FILL)
    shifted.narrow(axis, max(0, -offset), kept).copy_(clip.narrow(axis, max(0, offset), kept))
    return shifted


# In the order of `rand_augment.OPERATION_FACTORIES`.
OPERATIONS: tuple[ClipOperation, ...] = (
    _auto_contrast,
    _equalize,
    _invert,
    _rotate,
    _posterize,
    _solarize,
    _solarize_add,
    _color,
    _contrast,
    _brightness,
    _sharpness,
    _shear_x,
    _shear_y,
    _translate_x,
    _translate_y,
)
