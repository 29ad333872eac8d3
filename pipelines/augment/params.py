"""Augmentation parameters of a training clip, and the specifications of training clips and evaluation views.

Pure NumPy, no I/O. The parameters are a function of (seed, epoch, sample, repeat) and of the size of the
video. They hold for all frames of the clip.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.augment import rand_augment
from pipelines.augment.rand_augment import DrawnOperation, Operation
from pipelines.augment.roi import Box, restrict_to_roi
from pipelines.sampling.temporal import train_indices

CROP_TRIES = 10
JITTERED = (Operation.BRIGHTNESS, Operation.CONTRAST, Operation.COLOR)


@dataclass(frozen=True)
class TrainClipSpec:
    """How a training clip is sampled, cropped and augmented."""

    frames: int
    """Frames T of the clip."""
    size: int
    """Height and width of the clip in pixels."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Range of the crop's share of the frame's area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's width / height."""
    flip: float = 0.5
    """Probability of a mirrored clip."""
    color_jitter: float = 0.0
    """Brightness, contrast and saturation factors are in [1 - color_jitter, 1 + color_jitter]."""
    rand_augment: str | None = None
    """None, or a policy such as `rand-m7-n4-mstd0.5-inc1`."""
    max_short_side: int | None = None
    """To which frames with a longer short side are scaled down when they are decoded, in pixels."""

    @property
    def operations(self) -> int:
        """RandAugment operations per clip, at most."""
        return rand_augment.parse_policy(self.rand_augment).count if self.rand_augment else 0


@dataclass(frozen=True)
class ClipTransforms:
    """The transforms of a clip, in pixels of the full frame."""

    crop: Box
    """The random resized crop."""
    mirrored: bool
    """Whether the clip is flipped horizontally."""
    operations: list[DrawnOperation]
    """RandAugment operations on full frames, before the crop."""
    jitter: list[DrawnOperation]
    """Brightness, contrast and colour in their random order, after the crop."""


@dataclass(frozen=True)
class ClipParams:
    """The augmentation parameters of one training clip."""

    indices: NDArray[np.int32]
    """(T,) frame numbers."""
    roi: NDArray[np.int32]
    """(4,) top, left, bottom, right in pixels: the part of the decoded frames that the graph needs."""
    arrays: dict[str, NDArray[Any]]
    """The further inputs of `dali_nodes.augment_clip`, relative to the ROI, by the names of
    `dali.sample_layout.AUGMENTATION`: the crop matrix, (9,) float32; with RandAugment the operations (N,
    roi.PARAMETER_COUNT) float32; with jitter codes (3,) int32 and factors (3,) float32."""


def draw_clip_params(
    spec: TrainClipSpec,
    *,
    seed: int,
    epoch: int,
    sample: int,
    repeat: int,
    frames: int,
    height: int,
    width: int,
) -> ClipParams:
    """Draw the parameters of a clip from a video of `frames` frames of `height` x `width` pixels.

    Repeats of a sample share the frame numbers and nothing else.
    """
    indices = train_indices(frames, spec.frames, np.random.default_rng([seed, epoch, sample]))
    rng = np.random.default_rng([seed, epoch, sample, 1 + repeat])
    return _clip_params(spec, indices, draw_transforms(spec, rng, height, width), height, width)


def placeholder_params(spec: TrainClipSpec, size: int) -> ClipParams:
    """Without a draw, the parameters of a clip of one frame of `size` x `size` pixels: no crop, no change."""
    unchanged = [DrawnOperation(operation, (1.0,)) for operation in JITTERED]
    transforms = ClipTransforms(Box(0, 0, size, size), mirrored=False, operations=[], jitter=unchanged)
    return _clip_params(spec, np.zeros(spec.frames, np.int32), transforms, size, size)


def _clip_params(
    spec: TrainClipSpec, indices: NDArray[np.int32], transforms: ClipTransforms, height: int, width: int
) -> ClipParams:
    restricted = restrict_to_roi(transforms.operations, transforms.crop, height, width, spec.operations)
    matrix = crop_matrix(transforms.crop, transforms.mirrored, spec.size)
    arrays: dict[str, NDArray[Any]] = {"crop_matrix": matrix}
    if spec.operations:
        arrays["operations"] = restricted.parameters
    if spec.color_jitter:
        arrays["jitter_codes"] = np.array([each.operation for each in transforms.jitter], np.int32)
        arrays["jitter_factors"] = np.array([each.arguments[0] for each in transforms.jitter], np.float32)
    return ClipParams(indices, np.array(restricted.roi, np.int32), arrays)


def draw_transforms(spec: TrainClipSpec, rng: np.random.Generator, height: int, width: int) -> ClipTransforms:
    """Draw the transforms of a clip of `height` x `width` pixels."""
    crop = inception_crop(rng, height, width, spec.crop_scale, spec.crop_ratio)
    mirrored = bool(rng.random() < spec.flip)
    jitter = []
    if spec.color_jitter:
        factors = rng.uniform(max(0.0, 1 - spec.color_jitter), 1 + spec.color_jitter, size=len(JITTERED))
        jitter = [
            DrawnOperation(JITTERED[place], (factors[place],)) for place in rng.permutation(len(JITTERED))
        ]
    operations = []
    if spec.rand_augment:
        operations = rand_augment.draw_operations(
            rand_augment.parse_policy(spec.rand_augment), rng, height, width
        )
    return ClipTransforms(crop, mirrored, operations, jitter)


def crop_matrix(crop: Box, mirrored: bool, size: int) -> NDArray[np.float32]:
    """The matrix (3 x 3, row-major) from positions in the clip to positions in the crop."""
    height, width = crop.size
    across = (-width / size, 0, width) if mirrored else (width / size, 0, 0)
    return np.array([*across, 0, height / size, 0, 0, 0, 1], np.float32)


def inception_crop(
    rng: np.random.Generator,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Box:
    """The random resized crop of Szegedy et al. (2015): `CROP_TRIES` tries, then the largest centred crop.

    scale: range of the share of the area. ratio: range of width / height, which both results obey.
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
    return Box(top, left, top + crop_height, left + crop_width)


@dataclass(frozen=True)
class ViewSpec:
    """The views of a video in evaluation: `clips` x `crops`, from one decode."""

    frames: int
    """Frames T of each clip."""
    size: int
    """Height and width of the crops in pixels; the short side of the frames is resized to it."""
    clips: int = 1
    """Temporal segments."""
    crops: int = 1
    """1 (centre) or 3 (left, centre, right; top, centre, bottom for portrait videos)."""
    max_short_side: int | None = None
    """As in `TrainClipSpec`."""

    @property
    def views(self) -> int:
        """Views per video."""
        return self.clips * self.crops
