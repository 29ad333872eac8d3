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
from pipelines.augment.roi import TAPS

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
        frames = apply_operations(
            frames,
            arrays["operation_codes"],
            arrays["operation_arguments"],
            arrays["operation_regions"],
            clip.operations,
        )
    frames = resize_crop(frames, arrays["crop_matrix"], clip.size)
    if clip.color_jitter:
        frames = jitter(frames, arrays["jitter_codes"], arrays["jitter_factors"])
    return normalise(frames, mean, std)


def apply_operations(frames: Any, codes: Any, arguments: Any, regions: Any, count: int) -> Any:
    """Apply `count` operations in order; their parameters are those of `roi.restrict_to_roi`.

    codes: (count,). arguments: (count, 9). regions: (count, 4). The last operation gives the crop.
    """
    for index in range(count):
        frames = _apply(frames, codes[index], arguments[index], regions[index])
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


def _apply(frames: Any, operation: Any, argument: Any, region: Any) -> Any:
    """One operation, selected by its code in a binary tree: a batch is split at most four times."""
    if operation == int(Operation.NOTHING):
        result = frames
    elif operation <= int(Operation.SOLARIZE_ADD):
        if operation <= int(Operation.INVERT):
            if operation == int(Operation.AUTO_CONTRAST):
                result = _auto_contrast(frames, region)
            elif operation == int(Operation.EQUALIZE):
                result = _equalize(frames, region)
            else:
                result = _inverted(frames)
        else:
            if operation == int(Operation.POSTERIZE):
                result = frames & _level(argument[0])
            elif operation == int(Operation.SOLARIZE):
                result = _solarize(frames, _level(argument[0]))
            else:
                result = _solarize_add(frames, _level(argument[0]))
    elif operation <= int(Operation.SHARPNESS_AT_EDGE):
        if operation <= int(Operation.CONTRAST):
            if operation == int(Operation.COLOR):
                result = _color(frames, argument[0])
            else:
                result = _contrast(_cut(frames, region), argument[0], _mean_grey(frames))
        else:
            if operation == int(Operation.BRIGHTNESS):
                result = _brightness(frames, argument[0])
            elif operation == int(Operation.SHARPNESS):
                result = _sharpness(frames, argument)
            else:
                result = _sharpness_at_edge(frames, argument, region)
    else:
        if operation == int(Operation.WARP):
            result = _warp(frames, argument, region)
        elif operation == int(Operation.TRANSLATE_X):
            result = _translate(frames, fn.reshape(argument[:TAPS], shape=[1, TAPS]), region)
        else:
            result = _translate(frames, fn.reshape(argument[:TAPS], shape=[TAPS, 1]), region)
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


def _cut(frames: Any, region: Any) -> Any:
    """The rectangle `region`, (top, left, height, width); grey outside the frames."""
    return fn.slice(
        frames,
        start=region[0:2],
        shape=region[2:4],
        axis_names="HW",
        out_of_bounds_policy="pad",
        fill_values=FILL,
    )


def _grey(frames: Any) -> Any:
    """Luma by ITU-R BT.601, as in PIL: F H W 1."""
    return fn.color_space_conversion(frames, image_type=types.RGB, output_type=types.GRAY)


def _mean_grey(frames: Any) -> Any:
    """Mean luma of each frame, rounded: (F, 1, 1, 1), float32."""
    return math.floor(fn.reductions.mean(_grey(frames), axis_names="HWC", keep_dims=True) + 0.5)


def _inverted(frames: Any) -> Any:
    return frames ^ _constant(255)


def _auto_contrast(frames: Any, region: Any) -> Any:
    """Stretch each channel of each frame to the range 0 to 255."""
    low = fn.reductions.min(frames, axis_names="HW", keep_dims=True)
    span = fn.reductions.max(frames, axis_names="HW", keep_dims=True) - low
    flat = span == _constant(0)  # a channel of one level stays unchanged
    low = low * (span != _constant(0))
    span = span + flat * _constant(255)
    part = _cut(frames, region)
    # Broadcast to a row of equal pixels per frame: DALI processes (F, 1, W, 3) in whole rows, but (F, 1, 1,
    # 3) three values at a time, which takes 1.5 times as long.
    row = part[:, :1] * _constant(0)
    stretched = (
        (part - (row + low)) * types.Constant(255).uint16() // (row + fn.cast(span, dtype=types.UINT16))
    )
    return fn.cast(stretched, dtype=types.UINT8)


def _equalize(frames: Any, region: Any) -> Any:
    """Equalise the histogram of each channel of each frame.

    PIL ranks a level by the pixels below it, DALI by those up to and including it. Inverting before and
    after gives PIL's result.
    """
    return _inverted(_cut(fn.equalize(_inverted(frames)), region))


def _solarize(frames: Any, threshold: Any) -> Any:
    """Invert pixels at or above the threshold. In uint8, 0 - 1 is 255: all bits set."""
    return frames ^ (_constant(0) - (frames >= threshold))


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


def _sharpness(frames: Any, kernel: Any) -> Any:
    """Filter with a 3 x 3 `kernel`, (9,), row-major. The result is one pixel smaller on each side."""
    return fn.filter(frames, _on_device_of(frames, fn.reshape(kernel, shape=[3, 3])), mode="valid")


def _sharpness_at_edge(frames: Any, kernel: Any, edges: Any) -> Any:
    """`_sharpness` where the result reaches the frame's edge; the frame's outermost pixels stay unchanged.

    edges: 1 where the result touches the frame's top, left, bottom, right edge, else 0.
    """
    inner = fn.filter(frames, _on_device_of(frames, fn.reshape(kernel, shape=[3, 3])))[:, 1:-1, 1:-1]
    shape = frames.shape(dtype=types.INT32)
    height, width = shape[1], shape[2]
    left, right = frames[:, 1:-1, : edges[1]], frames[:, 1:-1, width - edges[3] :]
    first, last = 1 - edges[1], width - 1 + edges[3]
    top, bottom = frames[:, : edges[0], first:last], frames[:, height - edges[2] :, first:last]
    return fn.cat(top, fn.cat(left, inner, right, axis_name="W"), bottom, axis_name="H")


def _warp(frames: Any, matrix: Any, region: Any) -> Any:
    """Source position = matrix (3 x 3, row-major) times target position; bicubic."""
    return fn.experimental.warp_perspective(
        frames,
        matrix=fn.reshape(matrix, shape=[3, 3]),
        size=fn.cast(region[2:4], dtype=types.FLOAT),
        border_mode="constant",
        fill_value=[FILL, FILL, FILL],
        interp_type=types.INTERP_CUBIC,
    )


def _translate(frames: Any, kernel: Any, region: Any) -> Any:
    """Shift by a fraction of a pixel with the bicubic `kernel`, then by whole pixels; grey outside."""
    return _cut(fn.filter(frames, _on_device_of(frames, kernel), border="clamp"), region)


def _on_device_of(frames: Any, values: Any) -> Any:
    """The values on the device of the frames."""
    return values.gpu() if frames.device == "gpu" else values
