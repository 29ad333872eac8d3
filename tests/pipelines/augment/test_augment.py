"""Operations, crop, jitter and normalisation of the graph against timm, PIL and torchvision."""

from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import fn
from PIL import Image, ImageEnhance
from torchvision.transforms.v2 import functional as F

from pipelines.augment.dali_nodes import (
    _auto_contrast,
    _contrast_by_arithmetic,
    _cut,
    _mean_grey,
    _solarize,
    _stretched_by_arithmetic,
    _translate,
    augment_clip,
    jitter,
    resize_crop,
)
from pipelines.augment.params import TrainClipSpec, crop_matrix, draw_clip_params, draw_transforms
from pipelines.augment.rand_augment import OPERATION_FACTORIES, DrawnOperation, Operation
from pipelines.augment.roi import (
    ARGUMENT,
    CUT_MATRIX,
    PARAMETER_COUNT,
    REGION,
    SHIFT_KERNEL,
    SHIFT_MARGIN,
    TAPS,
    Box,
    input_box,
    operation_parameters,
)
from tests.pipelines.augmentation_graphs import on_full_frames, operated, run
from tests.pipelines.augmentation_parity import Case, by_graph, compare, frame

FRAME = frame("Invert")
HEIGHT, WIDTH = FRAME.shape[:2]
INTERPOLATED = {"Rotate", "ShearX", "ShearY"}
# Mean and greatest difference in levels, and why there is one; all others must be equal.
TOLERANCES = {
    "Equalize": (0.6, 1),  # PIL truncates the step between two levels to whole pixels
    "ColorIncreasing": (0.4, 2),  # two roundings instead of one
    "SharpnessIncreasing": (0.5, 1),  # PIL rounds the smoothed frame before it blends
    "TranslateXRel": (0.6, 1),  # PIL truncates
    "TranslateYRel": (0.6, 1),
}
# On a GPU contrast is arithmetic in float32, where a product and a sum are rounded once, not twice.
GPU_TOLERANCES = {**TOLERANCES, "ContrastIncreasing": (0.1, 1)}
# Of warps: mean difference, and the share that may be more than 12 levels off. On a GPU another library
# warps, with a bicubic kernel of another sharpness.
WARPED = {"cpu": (1, 0.01), "cuda": (2, 0.03)}


@pytest.fixture(scope="module")
def cases(device: torch.device) -> list[Case]:
    return compare(device)


@pytest.mark.parametrize("name", [name for name in OPERATION_FACTORIES if name not in INTERPOLATED])
def test_operation_equals_timm(name: str, cases: list[Case], device: torch.device) -> None:
    tolerances = GPU_TOLERANCES if device.type == "cuda" else TOLERANCES
    mean, greatest = tolerances.get(name, (0, 0))
    own = [case for case in cases if case.name == name]
    assert any((case.timm != case.before).mean() > 0.5 for case in own), (
        "nothing changes, so nothing is tested"
    )
    for case in own:
        assert case.difference.mean() <= mean, case.magnitude
        assert case.difference.max() <= greatest, case.magnitude


@pytest.mark.parametrize("name", sorted(INTERPOLATED))
def test_warp_is_close_to_timm(name: str, cases: list[Case], device: torch.device) -> None:
    """OpenCV's bicubic kernel is softer (-0.75) than PIL's (-1), and its frame ends a pixel softer."""
    mean, share = WARPED[device.type]
    for case in (case for case in cases if case.name == name):
        assert case.difference.mean() < mean, case.magnitude
        assert (case.difference > 12).mean() < share, case.magnitude


def test_statistics_are_per_frame(device: torch.device) -> None:
    frames = np.stack([FRAME // 2 + 40, FRAME // 3 + 10])
    for operation in (
        DrawnOperation(Operation.AUTO_CONTRAST),
        DrawnOperation(Operation.EQUALIZE),
        DrawnOperation(Operation.CONTRAST, (1.7,)),
    ):
        (together,) = operated([frames], [on_full_frames([operation], HEIGHT, WIDTH, 1)], device)
        for number, alone in enumerate(by_graph([operation] * 2, list(frames), device)):
            np.testing.assert_array_equal(together[number], alone)


def test_a_flat_channel_keeps_its_level(device: torch.device) -> None:
    flat = FRAME // 2 + 20
    flat[..., 1] = 77
    operations = [DrawnOperation(Operation.AUTO_CONTRAST), DrawnOperation(Operation.EQUALIZE)]
    for result in by_graph(operations, [flat, flat], device):
        assert (result[..., 1] == 77).all()
        assert (result[..., 0].min(), result[..., 0].max()) == (0, 255)


def test_each_clip_of_a_batch_has_its_own_operations_in_order(device: torch.device) -> None:
    invert, darken = DrawnOperation(Operation.INVERT), DrawnOperation(Operation.BRIGHTNESS, (0.5,))
    chains = [[], [invert], [invert, darken], [darken, invert]]
    laid_out = [on_full_frames(chain, HEIGHT, WIDTH, 2) for chain in chains]
    results = operated([FRAME[None]] * 4, laid_out, device)
    expected = [FRAME, 255 - FRAME, (255 - FRAME) // 2, 255 - FRAME // 2]
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result[0], wanted)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("crop", [Box(0, 0, 50, 70), Box(20, 30, 180, 300), Box(100, 200, 117, 213)])
def test_crop_is_resized_as_in_torchvision(crop: Box, mirrored: bool, device: torch.device) -> None:
    cut = np.ascontiguousarray(FRAME[crop.top : crop.bottom, crop.left : crop.right])
    (actual,) = run(
        lambda frames, matrix: resize_crop(frames, matrix, 96),
        [cut[None]],
        [crop_matrix(crop, mirrored, 96)],
        device=device,
    )
    wanted = (
        F.resize(torch.from_numpy(cut).permute(2, 0, 1), [96, 96], antialias=False).permute(1, 2, 0).numpy()
    )
    if mirrored:
        wanted = wanted[:, ::-1]
    difference = np.abs(actual[0].astype(int) - wanted)
    assert difference.mean() < 0.3
    assert difference.max() <= 1


ENHANCERS = {
    Operation.BRIGHTNESS: ImageEnhance.Brightness,
    Operation.CONTRAST: ImageEnhance.Contrast,
    Operation.COLOR: ImageEnhance.Color,
}


@pytest.mark.parametrize("order", [(9, 8, 7), (7, 9, 8), (8, 7, 9)])
def test_jitter_equals_pil_in_the_drawn_order(order: tuple[int, ...], device: torch.device) -> None:
    factors = (1.4, 0.7, 1.3)
    numbers = [np.array(order, np.int32)], [np.array(factors, np.float32)]
    (actual,) = run(jitter, [FRAME[None]], *numbers, device=device)
    picture = Image.fromarray(FRAME)
    for code, factor in zip(order, factors, strict=True):
        picture = ENHANCERS[Operation(code)](picture).enhance(factor)
    difference = np.abs(actual[0].astype(int) - np.asarray(picture))
    assert difference.mean() < 1  # colour is within two levels; later operations may stretch the difference
    assert difference.max() <= 4


def test_a_clip_equals_the_same_steps_applied_separately(device: torch.device) -> None:
    clip = TrainClipSpec(2, 64, color_jitter=0.4, rand_augment="rand-m7-n4-mstd0.5-inc1")
    mean, std = (0.45, 0.4, 0.5), (0.225, 0.2, 0.25)
    frames = np.stack([FRAME, FRAME[::-1]])
    key = {"seed": 3, "epoch": 0, "repeat": 0}
    draws = [
        draw_clip_params(clip, sample=sample, frames=9, height=HEIGHT, width=WIDTH, **key)
        for sample in range(12)
    ]
    windows = [
        np.ascontiguousarray(frames[:, top:bottom, left:right])
        for top, left, bottom, right in (draw.roi for draw in draws)
    ]
    assert any(window.shape != frames.shape for window in windows)

    def graph(frames: Any, *arrays: Any) -> Any:
        named = {name: arrays[index] for index, name in enumerate(draws[0].arrays)}
        return augment_clip(frames, named, clip, mean, std)

    arrays = zip(*(draw.arrays.values() for draw in draws), strict=True)
    results = run(graph, windows, *arrays, device=device)
    drawn = [
        draw_transforms(clip, np.random.default_rng([3, 0, sample, 1]), HEIGHT, WIDTH) for sample in range(12)
    ]
    full_frames = operated(
        [frames] * 12, [on_full_frames(changes.operations, HEIGHT, WIDTH, 4) for changes in drawn], device
    )
    for result, changes, full in zip(results, drawn, full_frames, strict=True):
        top, left, bottom, right = changes.crop
        cut = torch.from_numpy(np.ascontiguousarray(full[:, top:bottom, left:right])).permute(0, 3, 1, 2)
        resized = F.resize(cut, [64, 64], antialias=False)
        pictures = [Image.fromarray(each) for each in resized.permute(0, 2, 3, 1).numpy()]
        for each in changes.jitter:
            pictures = [ENHANCERS[each.operation](picture).enhance(each.arguments[0]) for picture in pictures]
        pixels = np.stack([np.asarray(picture) for picture in pictures]).astype(np.float32)
        wanted = ((pixels / 255 - mean) / std).transpose(3, 0, 1, 2)
        if changes.mirrored:
            wanted = wanted[..., ::-1]
        assert result.shape == (3, 2, 64, 64)
        assert result.dtype == np.float32
        level = 1 / 255 / min(std)
        assert np.abs(result - wanted).mean() < level, changes


def test_contrast_by_arithmetic_is_the_same() -> None:
    """The form for a GPU, run on the CPU."""

    def graph(frames: Any, factor: Any) -> Any:
        return _contrast_by_arithmetic(frames, factor, _mean_grey(frames))

    (wanted,) = by_graph([DrawnOperation(Operation.CONTRAST, (1.6,))], [FRAME])
    (actual,) = run(graph, [FRAME[None]], [np.array(1.6, np.float32)])
    assert np.abs(actual[0].astype(int) - wanted).max() <= 1


def test_auto_contrast_truncates_every_quotient(device: torch.device) -> None:
    """All spans, each from three darkest levels on, with all levels between; one pair in each channel."""
    spans = np.arange(256)
    low = np.concatenate([0 * spans, (255 - spans) // 2, 255 - spans])
    high = low + np.tile(spans, 3)
    assert set(high - low) == set(range(256))
    levels = np.clip(np.arange(256), low[:, None], high[:, None])
    span = np.maximum(high - low, 1)[:, None]
    wanted = np.where((high == low)[:, None], levels, (levels - low[:, None]) * 255 // span)
    frames, wanted = (
        each.reshape(-1, 3, 1, 256).transpose(0, 2, 3, 1).astype(np.uint8) for each in (levels, wanted)
    )
    whole = Box(0, 0, 1, 256)
    parameters = operation_parameters(DrawnOperation(Operation.AUTO_CONTRAST), whole, whole, 1, 256)
    (actual,) = run(_auto_contrast, [np.ascontiguousarray(frames)], [parameters], device=device)
    np.testing.assert_array_equal(actual, wanted)
    low, span = (
        each.reshape(-1, 1, 1, 3).astype(np.uint8)
        for each in (np.where(high == low, 0, low), np.where(high == low, 255, high - low))
    )
    (for_gpu,) = run(_stretched_by_arithmetic, [np.ascontiguousarray(frames)], [low], [span])
    np.testing.assert_array_equal(for_gpu, wanted)


def test_solarize_has_every_threshold(device: torch.device) -> None:
    levels, whole = np.arange(256, dtype=np.uint8), Box(0, 0, 1, 256)
    clip = np.repeat(levels, 3).reshape(1, 1, 256, 3)
    offsets = [
        operation_parameters(DrawnOperation(Operation.SOLARIZE, (level,)), whole, whole, 1, 256)[ARGUMENT]
        for level in range(256)
    ]
    results = run(_solarize, [clip] * 256, [np.array(each) for each in offsets], device=device)
    for level, result in enumerate(results):
        np.testing.assert_array_equal(result[0, 0, :, 0], np.where(levels >= level, 255 - levels, levels))


def region_parameters(top: int, left: int, height: int, width: int) -> np.ndarray:
    parameters = np.zeros(PARAMETER_COUNT, np.float32)
    parameters[REGION] = top, left, height, width
    parameters[CUT_MATRIX] = 1, 0, left, 0, 1, top, 0, 0, 1
    return parameters


def test_a_region_is_cut_to_the_pixel(device: torch.device) -> None:
    """Inside, across the edge and outside, in a frame that is wider than most."""
    frame = np.random.default_rng(0).integers(0, 256, (2, 40, 3000, 3), np.uint8)
    padded = np.pad(frame, [(0, 0), (60, 60), (500, 500), (0, 0)], constant_values=128)
    regions = [(0, 0, 40, 3000), (3, 2900, 20, 100), (-7, -400, 30, 500), (20, 2990, 33, 450), (45, 10, 9, 9)]
    results = run(_cut, [frame] * 5, [region_parameters(*each) for each in regions], device=device)
    for result, (top, left, height, width) in zip(results, regions, strict=True):
        wanted = padded[:, 60 + top : 60 + top + height, 500 + left : 500 + left + width]
        np.testing.assert_array_equal(result, wanted)


@pytest.mark.parametrize("operation", [Operation.TRANSLATE_X, Operation.TRANSLATE_Y])
def test_the_square_kernel_of_a_shift_is_that_of_one_axis(operation: Operation, device: torch.device) -> None:
    across = operation == Operation.TRANSLATE_X
    drawn, target = DrawnOperation(operation, (17.3,)), Box(0, 0, HEIGHT, WIDTH)
    source = input_box(drawn, target, HEIGHT, WIDTH)
    parameters = operation_parameters(drawn, source, target, HEIGHT, WIDTH)
    kernel = parameters[SHIFT_KERNEL].reshape(TAPS, TAPS)
    line = kernel[SHIFT_MARGIN][None] if across else kernel[:, SHIFT_MARGIN][:, None]
    line = np.ascontiguousarray(line)
    window = np.ascontiguousarray(FRAME[None, source.top : source.bottom, source.left : source.right])

    def by_line(frames: Any, parameters: Any, line: Any) -> Any:
        line = line.gpu() if frames.device == "gpu" else line
        return _cut(fn.filter(frames, line, border="clamp"), parameters)

    (wanted,) = run(by_line, [window], [parameters], [line], device=device)
    (actual,) = run(_translate, [window], [parameters], device=device)
    np.testing.assert_array_equal(actual, wanted)
