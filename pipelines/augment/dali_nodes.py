"""The DALI graph from decoded frames to normalised clips, driven only by numbers from the plan.

Frames are uint8, layout FHWC; one set of numbers holds for all frames of a clip, while what an operation
measures (darkest and brightest level, histogram, mean grey) it measures in each frame. Every function here
builds graph nodes and runs at build time; `if` on a graph node becomes a split of the batch.

The forms are those that cost least on a CPU. Float to uint8 is DALI's slowest step there (some 10 ns a value,
several times the arithmetic around it); so what can stays in integers, or in operations with a fast path for
uint8. `docs/augmentation.md` has the costs, and how near the results come to PIL's.
"""

from typing import Any

from nvidia.dali import fn, math, types

from pipelines.augment.params import TrainClipSpec
from pipelines.augment.rand_augment import Operation
from pipelines.augment.roi import TAPS

FILL = 128  # grey: what comes in from outside the frame when a clip is warped or shifted
TRUNCATE = -0.498  # PIL cuts fractions off where DALI rounds; a whole number, plus or minus 0.002, stays


def augment_clip(
    frames: Any, arrays: Any, clip: TrainClipSpec, mean: tuple[float, ...], std: tuple[float, ...]
) -> Any:
    """The window of the decoded frames, uint8 FHWC → float32 CFHW, (3, T, size, size), normalised.

    arrays: `ClipParams.arrays`. Operations, crop, flip, jitter, normalisation, in this order.
    """
    matrix, *rest = arrays
    if clip.operations:
        codes, arguments, regions = rest[:3]
        frames = apply_operations(frames, codes, arguments, regions, clip.operations)
    frames = resize_crop(frames, matrix, clip.size)
    if clip.color_jitter:
        frames = jitter(frames, *rest[-2:])
    return normalise(frames, mean, std)


def apply_operations(frames: Any, codes: Any, arguments: Any, regions: Any, count: int) -> Any:
    """Carry out `count` operations one after another, as `roi.restrict_to_roi` lays them out.

    codes: (count,). arguments: (count, 9). regions: (count, 4). The last one's result is the crop.
    """
    for turn in range(count):
        frames = _apply(frames, codes[turn], arguments[turn], regions[turn])
    return frames


def resize_crop(frames: Any, matrix: Any, size: int) -> Any:
    """Resize the crop to `size` x `size`, bilinear, and mirror it where `matrix` (9,) says so.

    Without antialiasing, as the released weights were trained and as a GPU's sampler does it. The edge is
    repeated outwards: what lies beyond the crop does not shine in.
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
    for turn in range(3):
        frames = _jitter_once(frames, codes[turn], factors[turn])
    return frames


def normalise(frames: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> Any:
    """Uint8 FHWC → float32 CFHW, `(x / 255 - mean) / std`."""
    return fn.crop_mirror_normalize(
        frames,
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
    """Uint8 FHWC → float32, `crops` crops of `crop` pixels stacked in front: (crops, 3, F, crop, crop).

    size: (height, width) to resize to, bilinear. positions: (crops, 2) shares of the free room in y and x.
    """
    resized = fn.resize(frames, size=size, interp_type=types.INTERP_LINEAR, antialias=False)
    cropped = [
        fn.crop_mirror_normalize(
            resized,
            crop=[crop, crop],
            crop_pos_y=positions[index, 0],
            crop_pos_x=positions[index, 1],
            mean=[255 * value for value in mean],
            std=[255 * value for value in std],
            dtype=types.FLOAT,
            output_layout="CFHW",
        )
        for index in range(crops)
    ]
    return fn.stack(*cropped)


def _apply(frames: Any, operation: Any, argument: Any, region: Any) -> Any:
    """One operation, chosen by its code: a binary tree, so that a batch is split four times at most."""
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
    """A scalar argument that is a pixel's level or bits."""
    return fn.cast(argument, dtype=types.UINT8)


def _constant(value: int) -> Any:
    return types.Constant(value).uint8()


def _cut(frames: Any, region: Any) -> Any:
    """The rectangle `region`: top, left, height, width; grey where it lies outside of the frames."""
    return fn.slice(
        frames,
        start=region[0:2],
        shape=region[2:4],
        axis_names="HW",
        out_of_bounds_policy="pad",
        fill_values=FILL,
    )


def _grey(frames: Any) -> Any:
    """Luma of ITU-R BT.601, as PIL converts: F H W 1."""
    return fn.color_space_conversion(frames, image_type=types.RGB, output_type=types.GRAY)


def _mean_grey(frames: Any) -> Any:
    """Mean luma of each frame as a whole number, in float32: (F, 1, 1, 1)."""
    return math.floor(fn.reductions.mean(_grey(frames), axis_names="HWC", keep_dims=True) + 0.5)


def _inverted(frames: Any) -> Any:
    return frames ^ _constant(255)


def _auto_contrast(frames: Any, region: Any) -> Any:
    """Stretch each channel of each frame so that its darkest level is 0 and its brightest 255."""
    low = fn.reductions.min(frames, axis_names="HW", keep_dims=True)
    span = fn.reductions.max(frames, axis_names="HW", keep_dims=True) - low
    flat = span == _constant(0)  # such a channel stays as it is
    low = low * (span != _constant(0))
    span = span + flat * _constant(255)
    part = _cut(frames, region)
    # A row of equal pixels for each frame: arithmetic with (F, 1, W, 3) runs along whole rows, with
    # (F, 1, 1, 3) three values at a time, which costs half as much again.
    row = part[:, :1] * _constant(0)
    stretched = (
        (part - (row + low)) * types.Constant(255).uint16() // (row + fn.cast(span, dtype=types.UINT16))
    )
    return fn.cast(stretched, dtype=types.UINT8)


def _equalize(frames: Any, region: Any) -> Any:
    """Spread each channel's histogram in each frame.

    PIL ranks a level by the pixels below it, DALI by those up to and with it: between the two lie two
    inversions.
    """
    return _inverted(_cut(fn.equalize(_inverted(frames)), region))


def _solarize(frames: Any, threshold: Any) -> Any:
    """Invert what is at or above the threshold: 0 - 1 is 255, all bits."""
    return frames ^ (_constant(0) - (frames >= threshold))


def _solarize_add(frames: Any, amount: Any) -> Any:
    """Brighten what is below mid-grey by `amount`, which is 128 at most: no sum exceeds 255."""
    return frames + (frames < _constant(128)) * amount


def _color(frames: Any, factor: Any) -> Any:
    """Blend each pixel with its grey: 0 is grey, 1 the clip itself."""
    pixels = fn.brightness_contrast(frames, brightness=factor, dtype=types.INT16)
    # The shift is a share of int16's range. The two roundings cost up to a level beside PIL's one.
    grey = fn.brightness_contrast(
        _grey(frames), brightness=1 - factor, brightness_shift=TRUNCATE / 32767, dtype=types.INT16
    )
    return fn.cast(pixels + grey, dtype=types.UINT8)


def _contrast(frames: Any, factor: Any, mean: Any) -> Any:
    """Blend with `mean` of each frame, (F, 1, 1, 1): 0 is flat grey, 1 the clip itself."""
    if frames.device == "gpu":  # arguments by name must lie in the host's memory, where the mean is not
        return _contrast_by_arithmetic(frames, factor, mean)
    return fn.brightness_contrast(
        frames,
        contrast=factor,
        contrast_center=fn.per_frame(fn.reshape(mean, shape=[-1])),
        brightness_shift=TRUNCATE / 255,
    )


def _contrast_by_arithmetic(frames: Any, factor: Any, mean: Any) -> Any:
    """The same, ten times slower on a CPU."""
    return fn.cast_like(mean + (frames - mean) * factor + TRUNCATE, frames)


def _brightness(frames: Any, factor: Any) -> Any:
    return fn.brightness_contrast(frames, brightness=factor, brightness_shift=TRUNCATE / 255)


def _sharpness(frames: Any, kernel: Any) -> Any:
    """Filter with `kernel` (9,), 3 x 3 row by row. A pixel on each side is used up."""
    return fn.filter(frames, _beside(frames, fn.reshape(kernel, shape=[3, 3])), mode="valid")


def _sharpness_at_edge(frames: Any, kernel: Any, edges: Any) -> Any:
    """The same where the result reaches the frame's edge, whose outermost pixels stay as they are.

    edges: 1 where the result touches the frame's top, left, bottom, right edge, else 0. Any of the parts
    may be empty.
    """
    inner = fn.filter(frames, _beside(frames, fn.reshape(kernel, shape=[3, 3])))[:, 1:-1, 1:-1]
    shape = frames.shape(dtype=types.INT32)
    height, width = shape[1], shape[2]
    left, right = frames[:, 1:-1, : edges[1]], frames[:, 1:-1, width - edges[3] :]
    first, last = 1 - edges[1], width - 1 + edges[3]
    top, bottom = frames[:, : edges[0], first:last], frames[:, height - edges[2] :, first:last]
    return fn.cat(top, fn.cat(left, inner, right, axis_name="W"), bottom, axis_name="H")


def _warp(frames: Any, matrix: Any, region: Any) -> Any:
    """Source position = matrix (3 x 3, row by row) times target position; bicubic."""
    return fn.experimental.warp_perspective(
        frames,
        matrix=fn.reshape(matrix, shape=[3, 3]),
        size=fn.cast(region[2:4], dtype=types.FLOAT),
        border_mode="constant",
        fill_value=[FILL, FILL, FILL],
        interp_type=types.INTERP_CUBIC,
    )


def _translate(frames: Any, kernel: Any, region: Any) -> Any:
    """Shift by a fraction of a pixel with `kernel`, bicubic, then by whole pixels, with grey outside."""
    return _cut(fn.filter(frames, _beside(frames, kernel), border="clamp"), region)


def _beside(frames: Any, values: Any) -> Any:
    """Values on the device of the frames."""
    return values.gpu() if frames.device == "gpu" else values
