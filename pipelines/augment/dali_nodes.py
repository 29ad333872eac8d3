"""DALI graph nodes from decoded frames to normalised clips, driven by the augmentation parameters only.

Frames are uint8 in layout FHWC. One set of parameters holds for all frames of a clip; statistics that an
operation needs (darkest and brightest level, histogram, mean grey) are those of each frame. Every function
here runs when the graph is built; an `if` on a graph node splits the batch.

The implementations are the cheapest ones on a CPU. There, float to uint8 is DALI's slowest step (about 10
ns a value, several times the arithmetic around it), so values stay integers where possible, or pass through
operations with a fast path for uint8. `docs/augmentation.md` has the costs and the differences from PIL.
"""

from collections.abc import Mapping
from typing import Any

from nvidia.dali import fn, math, types

from pipelines.augment.params import TrainClipSpec
from pipelines.augment.rand_augment import Operation
from pipelines.augment.roi import (
    ARGUMENT,
    CODE,
    CUT_MATRIX,
    MASK_SLOPE,
    MATRIX,
    REGION,
    SHIFT_KERNEL,
    SIZE,
    TAPS,
)

FILL = 128  # grey level outside the frame, for warps and shifts
TRUNCATE = -0.498  # PIL truncates where DALI rounds; a whole number, plus or minus 0.002, is kept


def augment_clip(
    frames: Any,
    arrays: Mapping[str, Any],
    clip: TrainClipSpec,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Any:
    """The ROI of the decoded frames, uint8 FHWC → normalised float32 CFHW, (3, T, size, size).

    arrays: nodes of `ClipParams.arrays`. The order is RandAugment, crop, flip, jitter, normalisation.
    """
    if clip.operations:
        frames = apply_operations(frames, arrays["operations"], clip.operations)
    frames = resize_crop(frames, arrays["crop_matrix"], clip.size)
    if clip.color_jitter:
        frames = jitter(frames, arrays["jitter_codes"], arrays["jitter_factors"])
    return normalise(frames, mean, std)


def apply_operations(frames: Any, parameters: Any, count: int) -> Any:
    """Apply `count` operations in order. The last one gives the crop.

    parameters: (count, PARAMETER_COUNT), of `roi.operation_parameters`.
    """
    for index in range(count):
        frames = _apply(frames, parameters[index])
    return frames


def resize_crop(frames: Any, matrix: Any, size: int) -> Any:
    """Resize the crop to `size` x `size`, bilinear, mirrored if `matrix` (9,) has a negative x scale.

    Without antialiasing, as in the training of the released weights. Edge pixels are repeated outwards, so
    pixels beyond the crop have no influence.
    """
    return fn.experimental.warp_perspective(
        frames,
        matrix=fn.reshape(matrix, shape=[3, 3]),
        size=[size, size],
        border_mode="replicate",
        interp_type=types.INTERP_LINEAR,
    )


def jitter(frames: Any, codes: Any, factors: Any) -> Any:
    """Scale brightness, contrast and saturation by `factors` (3,), in the order of `codes` (3,)."""
    for index in range(3):
        frames = _jitter_once(frames, codes[index], factors[index])
    return frames


def normalise(frames: Any, mean: tuple[float, ...], std: tuple[float, ...], **crop: Any) -> Any:
    """Uint8 FHWC → float32 CFHW, `(x / 255 - mean) / std`. crop: of `fn.crop_mirror_normalize`."""
    return fn.crop_mirror_normalize(
        frames,
        **crop,
        mean=[255 * value for value in mean],
        std=[255 * value for value in std],
        dtype=types.FLOAT,
        output_layout="CFHW",
    )


def crop_views(
    frames: Any,
    size: Any,
    positions: Any,
    crops: int,
    crop: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Any:
    """Resize and crop views: uint8 FHWC → normalised float32 (crops, 3, F, crop, crop).

    size: (height, width) after the bilinear resize. positions: (crops, 2), each crop's offset in y and x as
    a share of the largest offset.
    """
    resized = fn.resize(frames, size=size, interp_type=types.INTERP_LINEAR, antialias=False)
    cropped = [
        normalise(
            resized,
            mean,
            std,
            crop=[crop, crop],
            crop_pos_y=positions[index, 0],
            crop_pos_x=positions[index, 1],
        )
        for index in range(crops)
    ]
    return fn.stack(*cropped)


def _apply(frames: Any, parameters: Any) -> Any:
    """One operation, selected by its code in a binary tree, where it passes at most six conditions.

    A node costs time for each batch, and each `if` splits all that its branches use: hence one array.
    """
    operation = parameters[CODE]
    if operation == int(Operation.NOTHING):
        result = frames
    elif operation <= int(Operation.SOLARIZE_ADD):
        if operation <= int(Operation.INVERT):
            if operation == int(Operation.AUTO_CONTRAST):
                result = _auto_contrast(frames, parameters)
            elif operation == int(Operation.EQUALIZE):
                result = _equalize(frames, parameters)
            else:
                result = _inverted(frames)
        else:
            if operation == int(Operation.POSTERIZE):
                result = frames & _level(parameters[ARGUMENT])
            elif operation == int(Operation.SOLARIZE):
                result = _solarize(frames, parameters[ARGUMENT])
            else:
                result = _solarize_add(frames, _level(parameters[ARGUMENT]))
    elif operation <= int(Operation.SHARPNESS_AT_EDGE):
        if operation <= int(Operation.CONTRAST):
            if operation == int(Operation.COLOR):
                result = _color(frames, parameters[ARGUMENT])
            else:
                result = _contrast(_cut(frames, parameters), parameters[ARGUMENT], _mean_grey(frames))
        else:
            if operation == int(Operation.BRIGHTNESS):
                result = _brightness(frames, parameters[ARGUMENT])
            elif operation == int(Operation.SHARPNESS):
                result = _sharpness(frames, parameters)
            else:
                result = _sharpness_at_edge(frames, parameters)
    elif operation == int(Operation.WARP):
        result = _warp(frames, parameters)
    else:
        result = _translate(frames, parameters)
    return result


def _jitter_once(frames: Any, operation: Any, factor: Any) -> Any:
    if operation == int(Operation.COLOR):
        result = _color(frames, factor)
    elif operation == int(Operation.CONTRAST):
        result = _contrast(frames, factor, _mean_grey(frames))
    else:
        result = _brightness(frames, factor)
    return result


def _level(argument: Any) -> Any:
    """A scalar argument as a pixel level or bit mask."""
    return fn.cast(argument, dtype=types.UINT8)


def _constant(value: int) -> Any:
    return types.Constant(value).uint8()


def _cut(frames: Any, parameters: Any) -> Any:
    """The operation's region; grey outside the frames."""
    if frames.device == "gpu":
        region = fn.cast(parameters[REGION], dtype=types.INT32)
        return fn.slice(
            frames,
            start=region[0:2],
            shape=region[2:4],
            axis_names="HW",
            out_of_bounds_policy="pad",
            fill_values=FILL,
        )
    # On a CPU, OpenCV moves whole pixels about twice as fast as `slice`.
    return _warped(frames, parameters[CUT_MATRIX], parameters, types.INTERP_NN)


def _grey(frames: Any) -> Any:
    """Luma by ITU-R BT.601, as in PIL: F H W 1."""
    return fn.color_space_conversion(frames, image_type=types.RGB, output_type=types.GRAY)


def _mean_grey(frames: Any) -> Any:
    """Mean luma of each frame, rounded: (F, 1, 1, 1), float32."""
    return math.floor(fn.reductions.mean(_grey(frames), axis_names="HWC", keep_dims=True) + 0.5)


def _inverted(frames: Any) -> Any:
    return frames ^ _constant(255)


def _auto_contrast(frames: Any, parameters: Any) -> Any:
    """Stretch each channel of each frame to the range 0 to 255."""
    low = fn.reductions.min(frames, axis_names="HW", keep_dims=True)
    span = fn.reductions.max(frames, axis_names="HW", keep_dims=True) - low
    flat = span == _constant(0)  # a channel of one level stays unchanged
    low = low * (span != _constant(0))
    if frames.device == "gpu":  # named arguments are in host memory, as in `_contrast`
        return _stretched_by_arithmetic(_cut(frames, parameters), low, span + flat * _constant(255))
    # A quotient by `span` is at least 1/255 below the next whole number, or equal to it: float32 is exact.
    return fn.normalize(
        _cut(frames, parameters),
        axis_names="HW",
        mean=fn.cast(low, dtype=types.FLOAT),
        stddev=span / 255.0 + flat,
        shift=TRUNCATE,
        dtype=types.UINT8,
    )


def _stretched_by_arithmetic(part: Any, low: Any, span: Any) -> Any:
    """`(part - low) * 255 // span` in integers. low, span: (F, 1, 1, 3)."""
    # Broadcast to a row of equal pixels per frame: DALI processes (F, 1, W, 3) in whole rows, but (F, 1, 1,
    # 3) three values at a time, which takes 1.5 times as long.
    row = part[:, :1] * _constant(0)
    stretched = (
        (part - (row + low)) * types.Constant(255).uint16() // (row + fn.cast(span, dtype=types.UINT16))
    )
    return fn.cast(stretched, dtype=types.UINT8)


def _equalize(frames: Any, parameters: Any) -> Any:
    """Equalise the histogram of each channel of each frame.

    PIL ranks a level by the pixels below it, DALI by those up to and including it. Inverting before and
    after gives PIL's result.
    """
    return _inverted(_cut(fn.equalize(_inverted(frames)), parameters))


def _solarize(frames: Any, offset: Any) -> Any:
    """Invert pixels at or above a threshold, by a mask: a line that is so steep that it gives 0 or 255."""
    return frames ^ fn.brightness_contrast(frames, brightness=MASK_SLOPE, brightness_shift=offset)


def _solarize_add(frames: Any, amount: Any) -> Any:
    """Brighten pixels below mid-grey by `amount`, at most 128, so that no sum exceeds 255."""
    return frames + (frames < _constant(128)) * amount


def _color(frames: Any, factor: Any) -> Any:
    """Blend each pixel with its grey; factor 0 is grey, 1 is unchanged."""
    pixels = fn.brightness_contrast(frames, brightness=factor, dtype=types.INT16)
    # The shift is a share of int16's range. Rounding twice differs from PIL by up to one level.
    grey = fn.brightness_contrast(
        _grey(frames), brightness=1 - factor, brightness_shift=TRUNCATE / 32767, dtype=types.INT16
    )
    return fn.cast(pixels + grey, dtype=types.UINT8)


def _contrast(frames: Any, factor: Any, mean: Any) -> Any:
    """Blend with each frame's `mean`, (F, 1, 1, 1); factor 0 is uniform grey, 1 is unchanged."""
    if frames.device == "gpu":  # DALI takes named arguments from host memory only; the mean is on the GPU
        return _contrast_by_arithmetic(frames, factor, mean)
    return fn.brightness_contrast(
        frames,
        contrast=factor,
        contrast_center=fn.per_frame(fn.reshape(mean, shape=[-1])),
        brightness_shift=TRUNCATE / 255,
    )


def _contrast_by_arithmetic(frames: Any, factor: Any, mean: Any) -> Any:
    """`_contrast` by arithmetic, ten times slower on a CPU."""
    return fn.cast_like(mean + (frames - mean) * factor + TRUNCATE, frames)


def _brightness(frames: Any, factor: Any) -> Any:
    return fn.brightness_contrast(frames, brightness=factor, brightness_shift=TRUNCATE / 255)


def _sharpness(frames: Any, parameters: Any) -> Any:
    """Filter with a 3 x 3 kernel. The result is one pixel smaller on each side."""
    return fn.filter(frames, _kernel(frames, parameters[MATRIX], 3), mode="valid")


def _sharpness_at_edge(frames: Any, parameters: Any) -> Any:
    """`_sharpness` where the result reaches the frame's edge; the frame's outermost pixels stay unchanged.

    The outermost pixels of `frames` that are not the frame's are outside the region.
    """
    inner = fn.filter(frames, _kernel(frames, parameters[MATRIX], 3))[:, 1:-1, 1:-1]
    middle = fn.cat(frames[:, 1:-1, :1], inner, frames[:, 1:-1, -1:], axis_name="W")
    return _cut(fn.cat(frames[:, :1], middle, frames[:, -1:], axis_name="H"), parameters)


def _warp(frames: Any, parameters: Any) -> Any:
    """Source position = the operation's matrix times target position; bicubic."""
    return _warped(frames, parameters[MATRIX], parameters, types.INTERP_CUBIC)


def _warped(frames: Any, matrix: Any, parameters: Any, interpolation: Any) -> Any:
    """The region's pixels from `matrix`, (9,), times their positions; grey outside the frames."""
    return fn.experimental.warp_perspective(
        frames,
        matrix=fn.reshape(matrix, shape=[3, 3]),
        size=parameters[SIZE],
        border_mode="constant",
        fill_value=[FILL, FILL, FILL],
        interp_type=interpolation,
    )


def _translate(frames: Any, parameters: Any) -> Any:
    """Shift by a fraction of a pixel with the bicubic kernel, then by whole pixels; grey outside."""
    return _cut(
        fn.filter(frames, _kernel(frames, parameters[SHIFT_KERNEL], TAPS), border="clamp"), parameters
    )


def _kernel(frames: Any, values: Any, side: int) -> Any:
    """The kernel, side x side, on the device of the frames."""
    kernel = fn.reshape(values, shape=[side, side])
    return kernel.gpu() if frames.device == "gpu" else kernel
