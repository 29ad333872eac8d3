"""Every random number that a clip will use, and how a video is seen in training and in evaluation.

Pure NumPy, no I/O. A training clip's numbers are a function of (seed, epoch, sample, repeat) and of the size
of its video; one draw holds for all frames of the clip.
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
        """How many RandAugment operations a clip goes through at most."""
        return rand_augment.parse_policy(self.rand_augment).count if self.rand_augment else 0

    @property
    def array_count(self) -> int:
        """How many arrays `ClipParams.arrays` holds."""
        return 1 + 3 * (self.operations > 0) + 2 * (self.color_jitter > 0)


@dataclass(frozen=True)
class ClipTransforms:
    """What is done to a clip, in terms of the full frame.

    crop: in pixels. mirrored: left to right. operations: of RandAugment, on full frames, before the crop.
    jitter: brightness, contrast and colour in the order they are carried out, after the crop.
    """

    crop: Box
    mirrored: bool
    operations: list[DrawnOperation]
    jitter: list[DrawnOperation]


@dataclass(frozen=True)
class ClipParams:
    """Every number that one training clip needs.

    indices: (T,) frame numbers. roi: (4,) top, left, bottom, right in pixels: the part of the decoded
    frames that the graph takes. arrays: what the graph takes beside the frames, relative to the window, as
    `augment_clip` reads it: the placing of the crop, (9,) float32; with RandAugment codes (N,) int32,
    arguments (N, 9) float32 and regions (N, 4) int32; with jitter codes (3,) int32 and factors (3,) float32.
    """

    indices: NDArray[np.int32]
    roi: NDArray[np.int32]
    arrays: tuple[NDArray[Any], ...]


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
    """Draw a training clip from a video of `frames` frames of `height` x `width` pixels.

    Repeats of one sample share their frames and nothing else.
    """
    indices = train_indices(frames, spec.frames, np.random.default_rng([seed, epoch, sample]))
    rng = np.random.default_rng([seed, epoch, sample, 1 + repeat])
    changes = draw_transforms(spec, rng, height, width)
    narrowed = restrict_to_roi(changes.operations, changes.crop, height, width, spec.operations)
    arrays: tuple[NDArray[Any], ...] = (crop_matrix(changes.crop, changes.mirrored, spec.size),)
    if spec.operations:
        arrays += (narrowed.codes, narrowed.arguments, narrowed.regions)
    if spec.color_jitter:
        codes, factors = zip(*((each.operation, each.arguments[0]) for each in changes.jitter), strict=True)
        arrays += (np.array(codes, np.int32), np.array(factors, np.float32))
    return ClipParams(indices, np.array(narrowed.roi, np.int32), arrays)


def draw_transforms(spec: TrainClipSpec, rng: np.random.Generator, height: int, width: int) -> ClipTransforms:
    """Draw what is done to a clip of `height` x `width` pixels."""
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
    """The matrix (3 x 3, row by row) from a position in the clip to one in the crop, both from the corner."""
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
    """The random resized crop of Szegedy et al., in whole pixels.

    Ten tries, then the largest centred crop of allowed ratio.
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
