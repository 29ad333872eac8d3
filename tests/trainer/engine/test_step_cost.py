"""Times of batch plans on paper: those of the recorded kernels, for any micro-batch and recomputation."""

import dataclasses
from typing import Any

import pytest
import torch

from models import UniFormerV2Config, build_config
from trainer.engine.memory_estimate import MemoryModel
from trainer.engine.step_cost import StepCost
from trainer.engine.step_kernels import FP8_PRODUCTS, Device, record_step
from trainer.system.device import Precision

DEVICES = (Device(least=0.0, launch=0.0), Device(launch=1.0), Device(flops=1e30, bandwidth=1e6))
"""One bound by its kernels, one by the host that starts them, one by its memory."""
SHARE = 24


def model(form: str = "scene", **overrides: Any) -> UniFormerV2Config:
    fields = {"resolution": 32, "width": 64, "depth": 4, "heads": 4, "frames": 4, "num_classes": 8}
    return build_config("tiny", form=form, **{**fields, **overrides})


def cost_of(
    config: UniFormerV2Config,
    device: Device | None = None,
    *,
    ranks: int = 1,
    precision: Precision = "bf16",
    compiled: bool = False,
    kind: str = "cuda",
    fp8: bool = False,
) -> StepCost:
    memory = MemoryModel(
        config, ranks, precision, kind, fused=True, compiled=compiled, ema=False, prefetch=2, views=1
    )
    return StepCost(memory, SHARE, device=device, fp8=fp8)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        model(drop_path=0.3),
        model("temporal", depth=5, local_layers=(0, 2, 3)),
        model(temporal_module="joint_mhsa", global_layers=()),
        model("temporal", local_mhra=0, temporal_module="st_adapter"),
        model(frozen_backbone=True),
    ],
    ids=["scene", "local in some blocks", "joint attention", "adapter", "frozen"],
)
def test_times_are_those_of_the_recorded_kernels(config: UniFormerV2Config, compiled: bool) -> None:
    for batch, recomputed in ((2, 0), (3, 1), (2, config.depth - 1), (6, config.depth)):
        again = dataclasses.replace(config, recomputed_blocks=recomputed)
        recorded = record_step(again, batch, compiled=compiled, ranks=4)
        for device in DEVICES:
            cost = cost_of(config, device, ranks=4, compiled=compiled)
            expected = recorded.seconds(device, SHARE // batch)
            assert cost.seconds(1, batch, recomputed) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_micro_batch_of_one_clip_costs_at_most_4_percent_more_than_recorded(compiled: bool) -> None:
    """Some of the copies are views there."""
    config = model("temporal", depth=5, local_layers=(0, 2, 3))
    recorded = record_step(config, 1, compiled=compiled, ranks=4)
    for device in DEVICES:
        found = cost_of(config, device, ranks=4, compiled=compiled).seconds(1, 1, 0)
        expected = recorded.seconds(device, SHARE)
        assert expected * (1 - 1e-9) <= found <= 1.04 * expected


@pytest.mark.parametrize("compiled", [False, True])
def test_products_in_fp8_are_counted_at_their_rate(compiled: bool) -> None:
    config, batch = model(drop_path=0.3), 4  # whose rows are a multiple of 16, so that none is padded
    for recomputed in (0, 2):
        again = dataclasses.replace(config, recomputed_blocks=recomputed)
        recorded = record_step(again, batch, compiled=compiled, fp8=True)
        products = [kernel for kernel in recorded.kernels if kernel.kind == FP8_PRODUCTS]
        # Three for each of four layers and four blocks; recomputation leaves out no product.
        assert len(products) == 48 + 4 * recomputed
        for device in (*DEVICES, Device(fp8=1e6)):
            cost = cost_of(config, device, compiled=compiled, fp8=True)
            expected = recorded.seconds(device, SHARE // batch)
            assert cost.seconds(1, batch, recomputed) == pytest.approx(expected, rel=1e-9)


def test_precision_and_kind_of_device_choose_what_is_calculated_with() -> None:
    config = model(width=96)
    fp32 = record_step(config, 2, dtype=torch.float32)
    expected = fp32.seconds(Device(flops=51e12), SHARE // 2)
    assert cost_of(config, precision="fp32").seconds(0, 2, 0) == pytest.approx(expected, rel=1e-9)
    for recomputed in (0, 1, 3):  # on a CPU all blocks compute inputs again
        again = dataclasses.replace(config, recomputed_blocks=recomputed)
        on_cpu = record_step(again, 2, dtype=torch.float32, on_cpu=True)
        expected = on_cpu.seconds(Device(flops=200e9, bandwidth=20e9, least=0.0, launch=5e-6), SHARE // 2)
        found = cost_of(config, precision="fp32", kind="cpu").seconds(0, 2, recomputed)
        assert found == pytest.approx(expected, rel=1e-9)
    assert cost_of(config, precision="autocast").seconds(1, 2, 0) == cost_of(config).seconds(1, 2, 0)


def test_higher_stages_exchange_more_the_more_often_gradients_are_computed() -> None:
    cost = cost_of(model(), Device(least=0.0, launch=0.0), ranks=8)
    trained = cost.memory.trained * 2 * 7 / 8 / 50e9  # seconds to exchange the gradients once
    added = [cost.seconds(stage, 2, 0) - cost.seconds(0, 2, 0) for stage in range(4)]
    assert added == pytest.approx([0, 0, 11 / 12 * trained, (11 / 12 + 2) * trained])
    assert cost.seconds(2, SHARE, 0) == cost.seconds(1, SHARE, 0)
    alone = cost_of(model(), ranks=1)
    assert alone.seconds(3, 2, 0) == alone.seconds(0, 2, 0)


@pytest.mark.parametrize("device", [*DEVICES, None])
def test_larger_micro_batches_and_less_recomputation_are_never_slower(device: Device | None) -> None:
    """On this, plans are left out without timing them."""
    cost = cost_of(model("temporal", drop_path=0.2), device, ranks=2)
    for stage in range(4):
        for blocks in range(5):
            times = [cost.seconds_per_clip(stage, size, blocks) for size in (24, 12, 8, 4, 2, 1)]
            assert times == sorted(times)
        for size in (1, 8):
            times = [cost.seconds_per_clip(stage, size, blocks) for blocks in range(5)]
            assert times == sorted(times)
