"""Each operation of the graph against PIL on the same image."""

from collections.abc import Callable

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def
from PIL import Image, ImageEnhance, ImageOps

from pipelines.augment import augment, jitter
from pipelines.rand_augment import ARGUMENTS, Operation

HEIGHT, WIDTH, FRAMES = 240, 336, 2
BILINEAR = {"fillcolor": (128, 128, 128), "resample": Image.Resampling.BILINEAR}


def image() -> np.ndarray:
    """A colourful picture with grain and a few hard edges, whose channels span different ranges."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float64)
    waves = np.stack(
        [np.sin(x / 9) * np.cos(y / 13), np.cos(x / 15 + y / 7), np.sin((x + 2 * y) / 21)], axis=-1
    )
    grain = np.random.default_rng(0).uniform(-15, 15, (HEIGHT, WIDTH, 1))
    pixels = 120 + waves * [80, 50, 90] + grain
    pixels[80:160, 120:200] = [230, 20, 60]
    return pixels.round().astype(np.uint8)


def run(operation: Operation, *arguments: float) -> np.ndarray:
    """The graph's result for a clip of equal frames, batched with a clip that nothing is done to."""
    pixels = np.stack([image()] * FRAMES)
    numbers = np.zeros((1, ARGUMENTS), np.float32)
    numbers[0, : len(arguments)] = arguments

    @pipeline_def(batch_size=2, num_threads=1, device_id=None, enable_conditionals=True)
    def graph() -> object:
        frames, codes, values = fn.external_source(
            source=lambda info: (
                pixels,
                np.array([operation if info.idx_in_batch == 0 else Operation.NOTHING], np.int32),
                numbers,
            ),
            num_outputs=3,
            layout=["FHWC", "", ""],
            batch=False,
        )
        return augment(frames, codes, values, 1)

    pipeline = graph()
    pipeline.build()
    (result,) = pipeline.run()
    np.testing.assert_array_equal(np.array(result[1]), pixels)
    changed = np.array(result[0])
    np.testing.assert_array_equal(changed[0], changed[-1])
    return changed[0]


def affine(matrix: tuple[float, ...]) -> Callable[[Image.Image], Image.Image]:
    return lambda picture: picture.transform(picture.size, Image.Transform.AFFINE, matrix, **BILINEAR)


SHEAR = (1.0, 0.2, 0.0, 0.0, 1.0, 0.0)
CASES: dict[
    str, tuple[tuple[Operation, ...], tuple[float, ...], Callable[[Image.Image], Image.Image], float]
] = {
    "auto contrast": ((Operation.AUTO_CONTRAST,), (), ImageOps.autocontrast, 0.6),
    # DALI ranks a level by the pixels up to and with it, PIL by those below it: where one level holds 8 %
    # of the pixels, as the flat rectangle's does, the two lie up to 0.08 * 255 = 20 levels apart.
    "equalize": ((Operation.EQUALIZE,), (), ImageOps.equalize, 8.0),
    "invert": ((Operation.INVERT,), (), ImageOps.invert, 0.0),
    "posterize": ((Operation.POSTERIZE,), (0xC0,), lambda p: ImageOps.posterize(p, 2), 0.0),
    "solarize": ((Operation.SOLARIZE,), (100,), lambda p: ImageOps.solarize(p, 100), 0.0),
    "color": ((Operation.COLOR,), (1.6,), lambda p: ImageEnhance.Color(p).enhance(1.6), 0.6),
    "grey": ((Operation.COLOR,), (0.1,), lambda p: ImageEnhance.Color(p).enhance(0.1), 0.6),
    "contrast": ((Operation.CONTRAST,), (1.7,), lambda p: ImageEnhance.Contrast(p).enhance(1.7), 0.6),
    "brightness": ((Operation.BRIGHTNESS,), (0.4,), lambda p: ImageEnhance.Brightness(p).enhance(0.4), 0.6),
    "sharpness": ((Operation.SHARPNESS,), (1.8,), lambda p: ImageEnhance.Sharpness(p).enhance(1.8), 1.0),
    "shear": ((Operation.WARP,), SHEAR, affine(SHEAR), 1.0),
    "translate": ((Operation.TRANSLATE,), (7, -12), affine((1, 0, -12, 0, 1, 7)), 0.0),
}


@pytest.mark.parametrize("name", CASES)
def test_operation_equals_pil(name: str) -> None:
    (operation,), arguments, reference, tolerance = CASES[name]
    expected = np.asarray(reference(Image.fromarray(image()))).astype(int)
    assert np.abs(expected - image()).mean() > 3, "the case changes nothing, so it shows nothing"
    difference = np.abs(run(operation, *arguments).astype(int) - expected)
    assert difference.mean() <= tolerance


def test_solarize_add_brightens_the_dark_half_only() -> None:
    pixels = image().astype(int)
    expected = np.where(pixels < 128, np.minimum(pixels + 60, 255), pixels)
    np.testing.assert_array_equal(run(Operation.SOLARIZE_ADD, 60), expected)


def test_jitter_of_one_changes_nothing_and_brightness_scales() -> None:
    pixels = np.stack([image()] * FRAMES)

    def jittered(*factors: float) -> np.ndarray:
        @pipeline_def(batch_size=1, num_threads=1, device_id=None)
        def graph() -> object:
            frames, values = fn.external_source(
                source=lambda info: (pixels, np.array(factors, np.float32)),
                num_outputs=2,
                layout=["FHWC", ""],
                batch=False,
            )
            return jitter(frames, values)

        pipeline = graph()
        pipeline.build()
        (result,) = pipeline.run()
        return np.array(result[0]).astype(int)

    assert np.abs(jittered(1, 1, 1) - pixels).max() <= 1
    assert np.abs(jittered(0.5, 1, 1) - pixels * 0.5).max() <= 1.5
    grey = jittered(1, 1, 0)
    assert np.abs(grey - grey.mean(axis=-1, keepdims=True)).max() <= 1.5
