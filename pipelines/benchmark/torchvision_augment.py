"""The augmentation of a training clip with torchvision, in the fastest form found on a CPU.

Clips are uint8, (T, 3, H, W); the parameters hold for all frames of a clip. Each operation runs in the memory
layout in which it is fast (autocontrast in channels-last takes four times as long, sharpening in
channels-first ten times). Warps subtract the fill colour first, because torchvision's own `fill` warps a
mask as well. The crop comes before the conversion to float.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torchvision.transforms import InterpolationMode  # type: ignore[import-untyped]
from torchvision.transforms.v2 import functional as F  # type: ignore[import-untyped]

from pipelines.augment.params import inception_crop
from pipelines.augment.rand_augment import MAX_MAGNITUDE, Policy, draw_magnitude
from pipelines.benchmark.workload import CROP_RATIO, CROP_SCALE, FLIP, MEAN, STD

FILL = 128  # grey level outside the frame
LINEAR = InterpolationMode.BILINEAR

ClipOperation = Callable[[torch.Tensor, float, int], torch.Tensor]
"""Clip, level (magnitude / 10) and sign → changed clip."""


def rand_augment_clip(clip: torch.Tensor, policy: Policy, rng: np.random.Generator) -> torch.Tensor:
    """RandAugment on full frames, with the operations of `rand_augment.draw_operations` for this `rng`."""
    operations = tuple(OPERATIONS.values())
    for choice in rng.integers(0, len(operations), size=policy.count):
        is_applied = rng.random() < policy.probability
        level = draw_magnitude(policy, rng) / MAX_MAGNITUDE
        sign = 1 if rng.random() < 0.5 else -1
        if is_applied:
            clip = operations[choice](clip, level, sign)
    return clip


def crop_and_normalise(clip: torch.Tensor, size: int, rng: np.random.Generator) -> torch.Tensor:
    """Random resized crop, flip and normalisation: T 3 H W, uint8 → 3 T size size, float32."""
    cropped = _crop(clip, size, rng).transpose(0, 1)
    pixels = torch.empty(cropped.shape, dtype=torch.float32).copy_(cropped)
    return pixels.sub_(255 * MEAN).mul_(1 / (255 * STD))


def crop_to_uint8(clip: torch.Tensor, size: int, rng: np.random.Generator) -> torch.Tensor:
    """The same without the normalisation: T 3 H W, uint8 → 3 T size size, uint8."""
    return _crop(clip, size, rng).transpose(0, 1).contiguous()


def _crop(clip: torch.Tensor, size: int, rng: np.random.Generator) -> torch.Tensor:
    """T 3 H W → T 3 size size, uint8."""
    top, left, bottom, right = inception_crop(rng, clip.shape[-2], clip.shape[-1], CROP_SCALE, CROP_RATIO)
    # Resizing uint8 in channels-last is three times as fast as in channels-first.
    packed = clip.contiguous(memory_format=torch.channels_last)
    cropped = F.resized_crop(
        packed, top, left, bottom - top, right - left, [size, size], LINEAR, antialias=False
    )
    if rng.random() < FLIP:
        cropped = F.horizontal_flip(cropped)
    return cropped


def _warp(
    clip: torch.Tensor, angle: float, shear: tuple[float, float], center: list[float] | None
) -> torch.Tensor:
    """Rotate and shear, in degrees, about `center`, (x, y), or the middle of the frame."""
    shifted = clip.contiguous().to(torch.float32).sub_(FILL)
    warped = F.affine(shifted, angle, [0, 0], 1.0, list(shear), LINEAR, center=center)
    return warped.add_(FILL).round_().to(torch.uint8)


def _shear_degrees(level: float, sign: int) -> float:
    return math.degrees(math.atan(sign * level * 0.3))


def _solarize(clip: torch.Tensor, level: float, sign: int) -> torch.Tensor:
    # Twice as fast as F.solarize.
    return clip ^ (clip >= 256 - min(256, int(level * 256))).to(torch.uint8).mul_(255)


def _solarize_add(clip: torch.Tensor, level: float, sign: int) -> torch.Tensor:
    added = min(128, int(level * 110))
    return torch.where(clip < 128, clip.clamp(max=255 - added) + added, clip)


def _factor(level: float, sign: int) -> float:
    return max(0.1, 1 + sign * level * 0.9)


def _translate(clip: torch.Tensor, axis: int, share: float) -> torch.Tensor:
    """Shift by a share of the size, in whole pixels with one copy; a warp takes ten times as long."""
    size = clip.shape[axis]
    offset = max(-size, min(round(share * size), size))
    kept = size - abs(offset)
    shifted = torch.full_like(clip, FILL)
    shifted.narrow(axis, max(0, -offset), kept).copy_(clip.narrow(axis, max(0, offset), kept))
    return shifted


OPERATIONS: dict[str, ClipOperation] = {
    "AutoContrast": lambda clip, level, sign: F.autocontrast(clip.contiguous()),
    "Equalize": lambda clip, level, sign: F.equalize(clip),
    "Invert": lambda clip, level, sign: F.invert(clip),
    "Rotate": lambda clip, level, sign: _warp(clip, sign * level * 30, (0.0, 0.0), None),
    "PosterizeIncreasing": lambda clip, level, sign: F.posterize(clip, max(0, 4 - int(level * 4))),
    "SolarizeIncreasing": _solarize,
    "SolarizeAdd": _solarize_add,
    "ColorIncreasing": lambda clip, level, sign: F.adjust_saturation(clip.contiguous(), _factor(level, sign)),
    "ContrastIncreasing": lambda clip, level, sign: F.adjust_contrast(clip, _factor(level, sign)),
    "BrightnessIncreasing": lambda clip, level, sign: F.adjust_brightness(clip, _factor(level, sign)),
    "SharpnessIncreasing": lambda clip, level, sign: F.adjust_sharpness(
        clip.contiguous(memory_format=torch.channels_last), _factor(level, sign)
    ),
    "ShearX": lambda clip, level, sign: _warp(clip, 0.0, (_shear_degrees(level, sign), 0.0), [0.0, 0.0]),
    "ShearY": lambda clip, level, sign: _warp(clip, 0.0, (0.0, _shear_degrees(level, sign)), [0.0, 0.0]),
    "TranslateXRel": lambda clip, level, sign: _translate(clip, 3, sign * level * 0.45),
    "TranslateYRel": lambda clip, level, sign: _translate(clip, 2, sign * level * 0.45),
}
"""By timm's names, in the order of `rand_augment.OPERATION_FACTORIES`."""
