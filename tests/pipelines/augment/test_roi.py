"""What is computed on the window only must be what the full frame would have given inside the crop."""

import numpy as np
import pytest
import torch

from pipelines.augment.rand_augment import (
    OPERATION_FACTORIES,
    DrawnOperation,
    Operation,
    draw_operations,
    parse_policy,
)
from pipelines.augment.roi import Box, input_box, restrict_to_roi
from tests.pipelines.augmentation_graphs import on_full_frames, operated

HEIGHT, WIDTH, FRAMES = 90, 120, 2
# Source positions are computed in float32 from the corner of the window: a value may round to the other side.
WARP_TOLERANCE = 1


def clip(rng: np.random.Generator) -> np.ndarray:
    """Two different frames of waves, grain and a hard edge; F H W 3."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    phase, period = rng.uniform(0, 6, (FRAMES, 1, 1, 3)), rng.uniform(3, 20, 3)
    waves = 110 + 70 * np.sin((x + 2 * y)[None, ..., None] / period + phase)
    waves[:, 20:50, 30:90] += 40
    return np.clip(waves + rng.uniform(-12, 12, waves.shape), 0, 255).astype(np.uint8)


def crops(rng: np.random.Generator, count: int) -> list[Box]:
    """Boxes of any size and place; every fourth touches an edge of the frame, the first is all of it."""
    boxes = [Box(0, 0, HEIGHT, WIDTH)]
    while len(boxes) < count:
        top, bottom = sorted(rng.integers(0, HEIGHT + 1, 2))
        left, right = sorted(rng.integers(0, WIDTH + 1, 2))
        if len(boxes) % 4 == 0:
            top, right = 0, WIDTH
        if bottom > top and right > left:
            boxes.append(Box(int(top), int(left), int(bottom), int(right)))
    return boxes


def differences(
    clips: list[np.ndarray],
    operations: list[list[DrawnOperation]],
    boxes: list[Box],
    count: int,
    device: torch.device,
) -> list[np.ndarray]:
    """Windowed against full-frame results inside the crops, in levels."""
    windowed = operated(
        clips,
        [
            restrict_to_roi(drawn, box, HEIGHT, WIDTH, count)
            for drawn, box in zip(operations, boxes, strict=True)
        ],
        device,
    )
    full = operated(clips, [on_full_frames(drawn, HEIGHT, WIDTH, count) for drawn in operations], device)
    found = []
    for part, whole, box in zip(windowed, full, boxes, strict=True):
        inside = whole[:, box.top : box.bottom, box.left : box.right]
        assert part.shape == inside.shape
        found.append(np.abs(part.astype(int) - inside))
    return found


@pytest.mark.parametrize("name", OPERATION_FACTORIES)
def test_each_operation_on_its_roi(name: str, device: torch.device) -> None:
    rng = np.random.default_rng(list(name.encode()))
    operations = [
        [OPERATION_FACTORIES[name](rng.uniform(0.1, 1), sign, HEIGHT, WIDTH)]
        for sign in (-1.0, 1.0)
        for _ in range(20)
    ]
    boxes = crops(rng, len(operations))
    tolerance = WARP_TOLERANCE if operations[0][0].operation == Operation.WARP else 0
    for difference in differences([clip(rng) for _ in boxes], operations, boxes, 1, device):
        assert difference.max() <= tolerance


def test_chains_of_operations_on_their_windows(device: torch.device) -> None:
    policy, rng = parse_policy("rand-m9-n4-mstd0.5-inc1-p0.8"), np.random.default_rng(5)
    operations = [draw_operations(policy, rng, HEIGHT, WIDTH) for _ in range(200)]
    boxes = crops(rng, len(operations))
    found = differences([clip(rng) for _ in boxes], operations, boxes, policy.count, device)
    assert max(len(drawn) for drawn in operations) == policy.count
    for drawn, difference in zip(operations, found, strict=True):
        if Operation.WARP not in {each.operation for each in drawn}:
            assert difference.max() == 0, drawn
        else:
            # one level beside a threshold of solarize or posterize becomes many: count the pixels instead
            assert (difference > WARP_TOLERANCE).mean() < 0.01, drawn


def test_the_roi_is_minimal() -> None:
    crop = Box(30, 40, 60, 80)
    sizes = {
        name: input_box(OPERATION_FACTORIES[name](0.5, 1, HEIGHT, WIDTH), crop, HEIGHT, WIDTH).size
        for name in ("Invert", "SharpnessIncreasing", "ShearX", "TranslateYRel", "ContrastIncreasing")
    }
    assert sizes == {
        "Invert": (30, 40),
        "SharpnessIncreasing": (32, 42),
        "ShearX": (36, 50),  # 29 rows shift by 0.15 each, in whole pixels 4; three more on each side
        "TranslateYRel": (34, 40),
        "ContrastIncreasing": (HEIGHT, WIDTH),
    }


def test_a_crop_outside_the_frame_is_grey(device: torch.device) -> None:
    away = [DrawnOperation(Operation.TRANSLATE_X, (-500.0,))]
    for drawn in (
        away,
        [DrawnOperation(Operation.WARP, (1, 0, 0, 0, 1, 700.5))],
        [*away, DrawnOperation(Operation.SHARPNESS, (1.5,))],
    ):
        laid_out = restrict_to_roi(drawn, Box(0, 0, 20, 30), HEIGHT, WIDTH, 2)
        (result,) = operated([clip(np.random.default_rng(0))], [laid_out], device)
        assert result.shape == (FRAMES, 20, 30, 3)
        assert (result == 128).all()
