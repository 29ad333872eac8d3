"""The samples of a training batch and their augmentation, without reading a video."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipelines.augment.params import ClipTransforms, TrainClipSpec, draw_transforms
from pipelines.augment.rand_augment import DrawnOperation, Operation
from pipelines.dali.encoded_input import PLACEHOLDER_SIZE
from pipelines.dataset.concat import Dataset
from pipelines.dataset.manifest import ManifestRow
from pipelines.errors import VideoError
from pipelines.sampling.sampler import Slot, TrainSampler
from pipelines.sampling.temporal import train_indices


@dataclass(frozen=True)
class ClipDescription:
    """A slot of a global batch."""

    slot: Slot
    path: str
    """As in messages."""
    label: int
    """-1 where the manifest's row is bad."""
    frames: tuple[int, ...]
    """Numbers of its frames in the video."""
    changes: ClipTransforms
    """In coordinates of full frames."""


def describe_batch(
    dataset: Dataset, sampler: TrainSampler, clip: TrainClipSpec, step: int
) -> Iterator[ClipDescription]:
    """All clips of the global batch of `step`, counted from 0, in the batch's order."""
    for index in range(sampler.global_batch):
        slot = sampler.slot(step, index)
        row = _row(dataset, slot.sample)
        key = [sampler.seed, slot.epoch, slot.draw]
        height, width = (PLACEHOLDER_SIZE, PLACEHOLDER_SIZE) if row is None else (row.height, row.width)
        indices = train_indices(1 if row is None else row.frames, clip.frames, np.random.default_rng(key))
        yield ClipDescription(
            slot,
            dataset.printable_path(slot.sample),
            -1 if row is None else row.label,
            tuple((indices + (0 if row is None else row.first_frame)).tolist()),
            draw_transforms(clip, np.random.default_rng([*key, 1 + slot.repeat]), height, width),
        )


def _row(dataset: Dataset, sample: int) -> ManifestRow | None:
    try:
        return dataset.row(sample)
    except VideoError:
        return None


def format_changes(changes: ClipTransforms) -> list[str]:
    """The augmentation of a clip, in order: `rotate 12.0 degrees`, `crop ...`."""
    crop = changes.crop
    height, width = crop.size
    return [
        *(format_operation(drawn) for drawn in changes.operations),
        f"crop {width} x {height} at ({crop.left}, {crop.top})",
        *(["flip"] if changes.mirrored else []),
        *(format_operation(drawn) for drawn in changes.jitter),
    ]


def format_operation(drawn: DrawnOperation) -> str:
    """One RandAugment or jitter operation with its strength."""
    name = drawn.operation.name.lower().replace("_", " ")
    values = drawn.arguments
    match drawn.operation:
        case Operation.WARP:
            return _format_warp(values)
        case Operation.TRANSLATE_X | Operation.TRANSLATE_Y:
            return f"{name} by {-values[0]:+.1f} px"  # the argument is source minus target
        case Operation.POSTERIZE:
            return f"posterize to {int(values[0]).bit_count()} bits"
        case Operation.SOLARIZE:
            return f"solarize from {values[0]:.0f}"
        case Operation.SOLARIZE_ADD:
            return f"solarize add {values[0]:.0f}"
        case Operation.COLOR | Operation.CONTRAST | Operation.BRIGHTNESS | Operation.SHARPNESS:
            return f"{name} x {values[0]:.2f}"
        case _:
            return name


def _format_warp(matrix: tuple[float, ...]) -> str:
    """A rotation or a shear along one axis: the only warps of `rand_augment`."""
    across, down = matrix[1], matrix[3]
    if across and not down:
        return f"shear x by {across:+.2f}"
    if down and not across:
        return f"shear y by {down:+.2f}"
    return f"rotate by {math.degrees(math.atan2(down, matrix[0])):+.1f} degrees"
