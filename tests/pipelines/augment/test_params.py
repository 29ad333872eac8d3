import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import ColorJitter, RandomResizedCrop

from pipelines.augment.params import TrainClipSpec, draw_clip_params, draw_transforms, inception_crop
from pipelines.augment.rand_augment import Operation
from pipelines.augment.roi import PARAMETER_COUNT, Box

CLIP = TrainClipSpec(8, 64, color_jitter=0.4, rand_augment="rand-m7-n4-mstd0.5-inc1")
HEIGHT, WIDTH = 96, 128
CHANCE = 1e-3  # of a false alarm in each comparison; the seeds are fixed, so it came up once or never
DRAWS = 5000


def test_a_draw_is_a_function_of_its_key() -> None:
    def draw(**changes: int) -> list[np.ndarray]:
        key = {"seed": 1, "epoch": 2, "sample": 3, "repeat": 0} | changes
        drawn = draw_clip_params(CLIP, frames=100, height=HEIGHT, width=WIDTH, **key)
        crop_matrix, *others = drawn.arrays.values()
        return [crop_matrix, drawn.indices, drawn.roi, *others]

    for once, again in zip(draw(), draw(), strict=True):
        np.testing.assert_array_equal(once, again)
    for name in ("seed", "epoch", "sample", "repeat"):
        assert not np.array_equal(draw()[0], draw(**{name: 9})[0]), name


@pytest.mark.parametrize(
    ("jitter", "policy", "shapes"),
    [
        (0.0, None, [(9,)]),
        (0.4, None, [(9,), (3,), (3,)]),
        (0.0, "rand-m7-n2-inc1", [(9,), (2, PARAMETER_COUNT)]),
        (0.4, "rand-m7-n2-inc1", [(9,), (2, PARAMETER_COUNT), (3,), (3,)]),
    ],
)
def test_array_count_is_the_number_of_arrays(jitter: float, policy: str | None, shapes: list[tuple]) -> None:
    clip = TrainClipSpec(4, 32, color_jitter=jitter, rand_augment=policy)
    for sample in range(20):
        drawn = draw_clip_params(
            clip, seed=0, epoch=0, sample=sample, repeat=0, frames=9, height=HEIGHT, width=WIDTH
        )
        assert [array.shape for array in drawn.arrays.values()] == shapes
        assert drawn.roi.dtype == np.int32
        top, left, bottom, right = drawn.roi
        assert 0 <= top < bottom <= HEIGHT
        assert 0 <= left < right <= WIDTH


def test_without_operations_the_window_is_the_crop() -> None:
    clip = TrainClipSpec(4, 32)
    drawn = draw_clip_params(clip, seed=0, epoch=0, sample=5, repeat=1, frames=9, height=HEIGHT, width=WIDTH)
    changes = draw_transforms(clip, np.random.default_rng([0, 0, 5, 2]), HEIGHT, WIDTH)
    np.testing.assert_array_equal(drawn.roi, changes.crop)


# a wide, an upright and a square frame, and one so wide that many clips get none of their ten tries
@pytest.mark.parametrize(
    ("size", "scale"),
    [((240, 320), (0.08, 1.0)), ((320, 180), (0.08, 1.0)), ((224, 224), (0.5, 1.0)), ((60, 400), (0.1, 1.0))],
)
def test_crops_are_distributed_as_those_of_torchvision(
    size: tuple[int, int], scale: tuple[float, float]
) -> None:
    ratio = (3 / 4, 4 / 3)
    rng = np.random.default_rng(0)
    actual = np.array([inception_crop(rng, *size, scale, ratio) for _ in range(DRAWS)])
    torch.manual_seed(0)
    image = torch.zeros(3, *size)
    drawn = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(DRAWS)])
    baseline = np.concatenate([drawn[:, :2], drawn[:, :2] + drawn[:, 2:]], axis=1)

    def described(boxes: np.ndarray) -> dict[str, np.ndarray]:
        top, left, bottom, right = boxes.T
        height, width = bottom - top, right - left
        return {"area": height * width, "aspect": width / height, "top": top, "left": left, "right": right}

    for (name, one), other in zip(described(actual).items(), described(baseline).values(), strict=True):
        assert stats.ks_2samp(one, other).pvalue > CHANCE, name
    assert (actual[:, :2] >= 0).all()
    assert (actual[:, 2:] <= size).all()


@pytest.mark.parametrize("size", [(100, 1000), (1000, 100), (100, 101), (37, 300)])
def test_where_no_try_fits_the_middle_is_taken_as_by_torchvision(size: tuple[int, int]) -> None:
    scale, ratio = (5.0, 6.0), (3 / 4, 4 / 3)  # larger than the frame: every try fails
    top, left, height, width = RandomResizedCrop.get_params(torch.zeros(3, *size), list(scale), list(ratio))
    crop = inception_crop(np.random.default_rng(0), *size, scale, ratio)
    assert crop == Box(top, left, top + height, left + width)


@pytest.mark.parametrize("strength", [0.4, 1.5])
def test_jitter_is_distributed_as_that_of_torchvision(strength: float) -> None:
    clip, rng = TrainClipSpec(1, 32, color_jitter=strength), np.random.default_rng(0)
    actual = [draw_transforms(clip, rng, HEIGHT, WIDTH).jitter for _ in range(DRAWS)]
    torch.manual_seed(0)
    reference = ColorJitter(strength, strength, strength)
    baseline = [
        reference.get_params(reference.brightness, reference.contrast, reference.saturation, None)
        for _ in range(DRAWS)
    ]
    places = (Operation.BRIGHTNESS, Operation.CONTRAST, Operation.COLOR)  # as torchvision numbers them
    orders = [
        [tuple(places.index(each.operation) for each in drawn) for drawn in actual],
        [tuple(int(place) for place in order if place < 3) for order, *_ in baseline],
    ]
    assert len(set(orders[0])) == 6
    counts = [[side.count(order) for order in sorted(set(orders[0]))] for side in orders]
    assert stats.chi2_contingency(counts).pvalue > CHANCE
    for place, operation in enumerate(places):
        factors = [each.arguments[0] for drawn in actual for each in drawn if each.operation == operation]
        assert stats.ks_2samp(factors, [drawn[1 + place] for drawn in baseline]).pvalue > CHANCE, (
            operation.name
        )


def test_half_of_the_clips_are_mirrored() -> None:
    rng = np.random.default_rng(0)
    mirrored = sum(draw_transforms(TrainClipSpec(1, 32), rng, HEIGHT, WIDTH).mirrored for _ in range(DRAWS))
    assert stats.binomtest(mirrored, DRAWS).pvalue > CHANCE
    assert not any(
        draw_transforms(TrainClipSpec(1, 32, flip=0), rng, HEIGHT, WIDTH).mirrored for _ in range(99)
    )
