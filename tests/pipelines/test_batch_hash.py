"""The hash of a batch: what it depends on, and what it does not."""

import math
from dataclasses import replace

import pytest
import torch

from pipelines.batch_hash import format_hash, split_halves
from pipelines.loader import ClipBatch

CLIPS = 6


@pytest.fixture
def batch(device: torch.device) -> ClipBatch:
    clips = torch.arange(CLIPS * 3 * 4 * 16 * 16).view(CLIPS, 3, 4, 16, 16).to(device) / 1024 - 2
    numbers = torch.arange(CLIPS, device=device)
    return ClipBatch(clips, numbers % 4, numbers, numbers != 4, numbers * 0x9E3779B97F4A7C1 - 2**62)


def shown(batch: ClipBatch) -> str:
    return format_hash(*split_halves(batch.hash()).tolist())


def part(batch: ClipBatch, places: torch.Tensor) -> ClipBatch:
    return ClipBatch(*(getattr(batch, name)[places] for name in ("clips", "labels", "ids", "valid", "keys")))


def test_its_value_is_the_same_on_every_device_and_stays(batch: ClipBatch) -> None:
    assert shown(batch) == "346c98360e646527"


def test_order_and_split_of_the_clips_do_not_matter(batch: ClipBatch, device: torch.device) -> None:
    order = torch.tensor([4, 0, 5, 2, 1, 3], device=device)
    assert shown(part(batch, order)) == shown(batch)
    sums = sum(split_halves(part(batch, places).hash()) for places in order.split((1, 3, 2)))
    assert isinstance(sums, torch.Tensor) and format_hash(*sums.tolist()) == shown(batch)


def test_every_bit_and_every_place_matters(batch: ClipBatch) -> None:
    seen = {shown(batch)}
    bits = batch.clips.view(torch.int32)
    changes = 0
    for place in [(0, 0, 0, 0, 0), (2, 1, 3, 7, 9), (5, 2, 3, 15, 15)]:
        for bit in range(32):
            flipped = bits.clone()
            flipped[place] ^= -(2**31) if bit == 31 else 2**bit
            seen.add(shown(replace(batch, clips=flipped.view(torch.float32))))
            changes += 1
    signs = batch.clips.clone()
    signs[0, 0, 0, 0, :2] *= -1  # 2**31 twice: a plain sum would not change
    frames = batch.clips.clone()
    frames[1, :, [0, 2]] = batch.clips[1, :, [2, 0]]
    pixels = batch.clips.clone()
    pixels[3, 1, 1, 4, 5], pixels[3, 1, 1, 5, 4] = batch.clips[3, 1, 1, 5, 4], batch.clips[3, 1, 1, 4, 5]
    channels = batch.clips.flip(1)
    whole_clips = batch.clips.roll(1, 0)  # under the keys of others
    for clips in (signs, frames, pixels, channels, whole_clips):
        seen.add(shown(replace(batch, clips=clips)))
        changes += 1
    for name in ("labels", "keys"):
        values = getattr(batch, name).clone()
        values[1] += 1
        seen.add(shown(replace(batch, **{name: values})))
    seen.add(shown(replace(batch, valid=~batch.valid)))
    assert len(seen) == 1 + changes + 3


def test_a_sum_over_a_million_ranks_is_exact() -> None:
    value = torch.tensor(-3)
    upper, lower = (split_halves(value) * 2**20).tolist()
    assert format_hash(upper, lower) == f"{-3 * 2**20 % 2**64:016x}"


def test_clips_of_more_pixels_than_are_held_at_once_and_not_finite_ones(device: torch.device) -> None:
    clips = torch.zeros(1, 3, 4, 400, 400, device=device)
    one = torch.ones(1, dtype=torch.int64, device=device)
    large = ClipBatch(clips, one, one, one.bool(), one)
    before = shown(large)
    clips[0, 2, 3, 399, 399] = math.nan
    assert shown(large) != before
