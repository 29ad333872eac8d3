import numpy as np

from pipelines.draw import TrainClip, draw_clip, inception_crop


def test_a_draw_is_a_function_of_its_key() -> None:
    clip = TrainClip(8, 64, color_jitter=0.4, rand_augment="rand-m7-n4-mstd0.5-inc1")

    def draw(**changes: int) -> list[np.ndarray]:
        key = {"seed": 1, "epoch": 2, "sample": 3, "repeat": 0} | changes
        drawn = draw_clip(clip, frames=100, height=96, width=128, **key)
        return [drawn.indices, drawn.crop, drawn.jitter, drawn.arguments]

    for once, again in zip(draw(), draw(), strict=True):
        np.testing.assert_array_equal(once, again)
    for name in ("seed", "epoch", "sample", "repeat"):
        assert not np.array_equal(draw()[1], draw(**{name: 9})[1]), name


def test_crops_stay_inside_and_have_the_asked_area_and_ratio() -> None:
    rng = np.random.default_rng(0)
    crops = np.array([inception_crop(rng, 240, 320, (0.2, 0.6), (0.75, 4 / 3)) for _ in range(2000)])
    top, left, bottom, right = crops.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (bottom <= 240).all()
    assert (right <= 320).all()
    area = (bottom - top) * (right - left) / (240 * 320)
    ratio = (right - left) / (bottom - top)
    assert 0.19 < area.min() < 0.21
    assert 0.59 < area.max() < 0.61
    assert 0.74 < ratio.min() < 0.77
    assert 1.31 < ratio.max() < 1.35


def test_a_frame_too_narrow_for_any_crop_gives_its_middle() -> None:
    crop = inception_crop(np.random.default_rng(0), 100, 1000, (0.9, 1.0), (0.75, 4 / 3))
    np.testing.assert_array_equal(crop, [0, 433, 100, 566])
