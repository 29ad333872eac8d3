"""The DALI graph from decoded frames to normalised clips, driven only by numbers from the plan.

Frames are uint8, layout FHWC; one set of numbers holds for all frames of a clip. Every function here builds
graph nodes and runs at build time; `if` on a graph node becomes a split of the batch.
"""

from typing import Any

import numpy as np
from nvidia.dali import fn, math, types

from .rand_augment import Operation

FILL = 128  # grey: what comes in from outside the frame when a clip is warped or shifted
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as PIL converts to grey
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # PIL's kernel for sharpness
IDENTITY_KERNEL = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]], np.float32)
SOLARIZE_ADD_BELOW = 128


def augment(frames: Any, operations: Any, arguments: Any, count: int) -> Any:
    """RandAugment: carry out `count` operations one after another on full-size frames.

    operations: (count,) codes of `rand_augment.Operation`. arguments: (count, 6).
    """
    for place in range(count):
        frames = _apply(frames, operations[place], arguments[place])
    return frames


def cut(frames: Any, crop: Any, size: int) -> Any:
    """Cut the region `crop` (top, left, bottom, right) and resize it to `size` x `size`, bilinear.

    Without antialiasing, as the released weights were trained and as a GPU's sampler does it.
    """
    return fn.resize(
        frames,
        roi_start=crop[0:2],
        roi_end=crop[2:4],
        size=[size, size],
        interp_type=types.INTERP_LINEAR,
        antialias=False,
    )


def jitter(frames: Any, factors: Any) -> Any:
    """Scale brightness, contrast (about mid-grey) and saturation by `factors`, in this order."""
    return fn.color_twist(frames, brightness=factors[0], contrast=factors[1], saturation=factors[2])


def normalise(frames: Any, mirror: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> Any:
    """Uint8 FHWC → float32 CFHW, `(x / 255 - mean) / std`, mirrored left to right where `mirror` is 1."""
    return fn.crop_mirror_normalize(
        frames,
        mirror=mirror,
        mean=[255 * value for value in mean],
        std=[255 * value for value in std],
        dtype=types.FLOAT,
        output_layout="CFHW",
    )


def views(
    frames: Any,
    size: Any,
    positions: Any,
    crops: int,
    crop: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Any:
    """Uint8 FHWC → float32, `crops` crops of `crop` pixels stacked in front: (crops, 3, F, crop, crop).

    size: (height, width) to resize to, bilinear. positions: (crops, 2) shares of the free room in y and x.
    """
    resized = fn.resize(frames, size=size, interp_type=types.INTERP_LINEAR, antialias=False)
    cropped = [
        fn.crop_mirror_normalize(
            resized,
            crop=[crop, crop],
            crop_pos_y=positions[place, 0],
            crop_pos_x=positions[place, 1],
            mean=[255 * value for value in mean],
            std=[255 * value for value in std],
            dtype=types.FLOAT,
            output_layout="CFHW",
        )
        for place in range(crops)
    ]
    return fn.stack(*cropped)


def _apply(frames: Any, operation: Any, argument: Any) -> Any:
    """One operation, chosen by its code: a binary tree, so that a batch is split four times at most."""
    if operation == int(Operation.NOTHING):
        result = frames
    elif operation <= int(Operation.SOLARIZE_ADD):
        if operation <= int(Operation.INVERT):
            if operation == int(Operation.AUTO_CONTRAST):
                result = _auto_contrast(frames)
            elif operation == int(Operation.EQUALIZE):
                result = fn.equalize(frames)
            else:
                result = frames ^ types.Constant(255).uint8()
        else:
            if operation == int(Operation.POSTERIZE):
                result = frames & fn.cast(argument[0], dtype=types.UINT8)
            elif operation == int(Operation.SOLARIZE):
                result = _solarize(frames, argument[0])
            else:
                result = _solarize_add(frames, argument[0])
    else:
        if operation <= int(Operation.BRIGHTNESS):
            if operation == int(Operation.COLOR):
                result = _color(frames, argument[0])
            elif operation == int(Operation.CONTRAST):
                result = _contrast(frames, argument[0])
            else:
                result = fn.brightness(frames, brightness=argument[0])
        else:
            if operation == int(Operation.SHARPNESS):
                result = _sharpness(frames, argument[0])
            elif operation == int(Operation.WARP):
                result = _warp(frames, argument)
            else:
                result = _translate(frames, argument)
    return result


def _auto_contrast(frames: Any) -> Any:
    """Stretch each channel of each frame so that its darkest value is 0 and its brightest 255."""
    low = fn.cast(fn.reductions.min(frames, axis_names="HW", keep_dims=True), dtype=types.FLOAT)
    high = fn.cast(fn.reductions.max(frames, axis_names="HW", keep_dims=True), dtype=types.FLOAT)
    flat = high <= low
    low = low * (1 - flat)
    scale = 255.0 / math.max(high * (1 - flat) + 255.0 * flat - low, 1.0)
    return fn.cast_like((fn.cast(frames, dtype=types.FLOAT) - low) * scale - 0.5, frames)


def _solarize(frames: Any, threshold: Any) -> Any:
    """Invert what is at or above the threshold."""
    above = fn.cast(frames >= fn.cast(threshold, dtype=types.INT32), dtype=types.UINT8)
    return frames ^ (above * types.Constant(255).uint8())


def _solarize_add(frames: Any, amount: Any) -> Any:
    """Brighten what is below mid-grey by `amount`, at most to white."""
    below = fn.cast(frames < SOLARIZE_ADD_BELOW, dtype=types.INT32)
    added = fn.cast(frames, dtype=types.INT32) + below * fn.cast(amount, dtype=types.INT32)
    return fn.cast_like(math.min(added, 255), frames)


def _color(frames: Any, factor: Any) -> Any:
    """Blend each pixel with its grey: 0 is grey, 1 the clip itself."""
    pixels = fn.cast(frames, dtype=types.FLOAT)
    grey = fn.reductions.sum(pixels * types.Constant(LUMA), axis_names="C", keep_dims=True)
    return fn.cast_like(grey + (pixels - grey) * factor, frames)


def _contrast(frames: Any, factor: Any) -> Any:
    """Blend with the mean grey of each frame: 0 is flat grey, 1 the clip itself."""
    means = fn.reductions.mean(frames, axis_names="HW", keep_dims=True)
    grey = fn.reductions.sum(means * types.Constant(LUMA), axis_names="C", keep_dims=True)
    return fn.cast_like(grey + (fn.cast(frames, dtype=types.FLOAT) - grey) * factor, frames)


def _sharpness(frames: Any, factor: Any) -> Any:
    """Blend with the smoothed clip: one 3x3 kernel does both."""
    kernel = types.Constant(SMOOTH) * (1 - factor) + types.Constant(IDENTITY_KERNEL) * factor
    return fn.filter(frames, kernel)


def _warp(frames: Any, matrix: Any) -> Any:
    """Source position = matrix (2 x 3, row by row) times target position; bilinear."""
    return fn.warp_affine(
        frames,
        matrix=fn.reshape(matrix, shape=[2, 3]),
        inverse_map=True,
        fill_value=FILL,
        interp_type=types.INTERP_LINEAR,
    )


def _translate(frames: Any, offset: Any) -> Any:
    """Shift by whole pixels: a window of the same size, `offset` (y, x) away, grey outside the frame.

    A slice costs a twentieth of a warp on a CPU.
    """
    return fn.slice(
        frames,
        start=fn.cast(offset[0:2], dtype=types.INT32),
        shape=frames.shape(dtype=types.INT32)[1:3],
        axis_names="HW",
        out_of_bounds_policy="pad",
        fill_values=FILL,
    )
