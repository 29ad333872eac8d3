"""Policies and draws against timm's own."""

import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from timm.data.auto_augment import rand_augment_transform

from pipelines.augment.rand_augment import (
    OPERATION_FACTORIES,
    DrawnOperation,
    Operation,
    Policy,
    draw_operations,
    parse_policy,
)
from pipelines.errors import DataError

POLICY = "rand-m7-n4-mstd0.5-inc1"
HEIGHT, WIDTH = 200, 300
CHANCE = 1e-3  # of a false alarm in each comparison; the seeds are fixed, so it came up once or never


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        (POLICY, Policy(7, 4, 0.5, 0.5)),
        ("rand-m9-n2-inc1-p0.8", Policy(9, 2, 0.0, 0.8)),
        ("rand-inc1", Policy(10, 2, 0.0, 0.5)),
        ("rand-m9-mstd101-inc1", Policy(9, 2, float("inf"), 0.5)),
        ("rand-m15-n1-mmax20-inc1", Policy(15, 1, 0.0, 0.5, 20)),
        ("rand-m8-mmax0-inc1", Policy(8, 2, 0.0, 0.5, 10)),
    ],
)
def test_a_policy_means_what_it_means_to_timm(text: str, policy: Policy) -> None:
    assert parse_policy(text) == policy
    baseline = rand_augment_transform(text)
    operation = baseline.ops[0]
    assert Policy(
        operation.magnitude,
        baseline.num_layers,
        operation.magnitude_std,
        operation.prob,
        operation.magnitude_max or 10,
    ) == parse_policy(text)
    assert [each.name for each in baseline.ops] == list(OPERATION_FACTORIES)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("augmix-m3", "must start with 'rand-'"),
        ("rand-m7-n4", "add '-inc1'"),
        ("rand-m7-n4-inc0", "add '-inc1'"),
        ("rand-m7-n4-inc", "'inc' must be 'inc' and a whole number"),
        ("rand-m7-x4-inc1", "'x4' is not one of"),
        ("rand-m7-n1.5-inc1", "'n1.5' must be 'n' and a whole number"),
        ("rand-m7.5-n1-inc1", "'m7.5' must be 'm' and a whole number"),
        ("rand-m7-n0-inc1", "n must lie in 1..16"),
        ("rand-m7-p1.5-inc1", "p must lie in 0..1"),
        ("rand-m7-w0-inc1", "'w0' chooses another set"),
        ("rand-m7-inc1-tweights", "'tweights' chooses another set"),
        ("rand-m7-inc1-t3a", "'t3a' chooses another set"),
        ("rand-m7--inc1", "part '' is not one of"),
    ],
)
def test_a_wrong_policy_is_named(text: str, named: str) -> None:
    with pytest.raises(DataError, match=named):
        parse_policy(text)


def named(drawn: DrawnOperation) -> tuple[str, float]:
    """timm's name of a drawn operation, and its argument as timm counts it; NaN for none."""
    operation, arguments = drawn
    if operation == Operation.WARP:
        a, b, _, d, *_ = arguments
        if (a, d) == (1, 0):
            return "ShearX", b
        return ("ShearY", d) if (a, b) == (1, 0) else ("Rotate", float(np.rad2deg(np.arctan2(d, a))))
    if operation == Operation.POSTERIZE:
        return "PosterizeIncreasing", float(bin(int(arguments[0])).count("1"))
    name, scale = {
        Operation.AUTO_CONTRAST: ("AutoContrast", 1),
        Operation.EQUALIZE: ("Equalize", 1),
        Operation.INVERT: ("Invert", 1),
        Operation.SOLARIZE: ("SolarizeIncreasing", 1),
        Operation.SOLARIZE_ADD: ("SolarizeAdd", 1),
        Operation.COLOR: ("ColorIncreasing", 1),
        Operation.CONTRAST: ("ContrastIncreasing", 1),
        Operation.BRIGHTNESS: ("BrightnessIncreasing", 1),
        Operation.SHARPNESS: ("SharpnessIncreasing", 1),
        Operation.TRANSLATE_X: ("TranslateXRel", WIDTH),
        Operation.TRANSLATE_Y: ("TranslateYRel", HEIGHT),
    }[operation]
    return name, arguments[0] / scale if arguments else float("nan")


def drawn_by_timm(text: str, clips: int) -> list[list[tuple[str, float]]]:
    """What timm does to `clips` images, recorded where it calls its image operations."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 timm draws from the global generator
    transform = rand_augment_transform(text)
    firing: list[tuple[str, float]] = []
    for operation in transform.ops:

        def note(
            image: Image.Image, *arguments: float, name: str = operation.name, **_: object
        ) -> Image.Image:
            firing.append((name, arguments[0] if arguments else float("nan")))
            return image

        operation.aug_fn = note
    image, clips_drawn = Image.new("RGB", (WIDTH, HEIGHT)), []
    for _ in range(clips):
        firing.clear()
        transform(image)
        clips_drawn.append(list(firing))
    return clips_drawn


@pytest.mark.parametrize("text", [POLICY, "rand-m9-n3-mstd101-inc1-p0.7", "rand-m12-n2-mstd3-mmax14-inc1"])
def test_draws_are_distributed_as_those_of_timm(text: str) -> None:
    policy, rng, clips = parse_policy(text), np.random.default_rng(0), 6000
    actual = [[named(each) for each in draw_operations(policy, rng, HEIGHT, WIDTH)] for _ in range(clips)]
    # solarize at 256 changes nothing: we leave it out; posterize gives black with fewer bits than none, too
    baseline = [
        [
            (name, max(value, 0) if name == "PosterizeIncreasing" else value)
            for name, value in clip
            if (name, value) != ("SolarizeIncreasing", 256)
        ]
        for clip in drawn_by_timm(text, clips)
    ]

    def same_counts(one: Counter, other: Counter) -> bool:
        keys = sorted(one | other)
        return stats.chi2_contingency([[c[key] for key in keys] for c in (one, other)]).pvalue > CHANCE

    assert same_counts(Counter(map(len, actual)), Counter(map(len, baseline)))
    assert same_counts(*(Counter(name for clip in side for name, _ in clip) for side in (actual, baseline)))
    assert same_counts(  # the order: which operation comes first
        *(Counter(clip[0][0] for clip in side if clip) for side in (actual, baseline))
    )
    for name in OPERATION_FACTORIES:
        values = [
            [value for clip in side for key, value in clip if key == name] for side in (actual, baseline)
        ]
        if not np.isnan(values[0][0]):
            assert stats.ks_2samp(*values).pvalue > CHANCE, name


def test_arguments_at_full_magnitude() -> None:
    policy, rng = parse_policy("rand-m10-n16-inc1-p1"), np.random.default_rng(1)
    seen: dict[str, set[float]] = {}
    for _ in range(300):
        for each in draw_operations(policy, rng, HEIGHT, WIDTH):
            name, value = named(each)
            seen.setdefault(name, set()).add(round(value, 4))
    assert seen["PosterizeIncreasing"] == {0.0}  # no bit left
    assert seen["SolarizeIncreasing"] == {0.0}
    assert seen["SolarizeAdd"] == {110.0}
    assert seen["ColorIncreasing"] == {0.1, 1.9}
    assert seen["TranslateYRel"] == seen["TranslateXRel"] == {-0.45, 0.45}
    assert seen["ShearX"] == seen["ShearY"] == {-0.3, 0.3}
    assert seen["Rotate"] == {-30.0, 30.0}
