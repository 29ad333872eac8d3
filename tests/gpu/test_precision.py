"""The engine in bf16 on a GPU at each ZeRO stage, beside fp32 and other ways to the same numbers.

In bf16 the lowest stage is 1: a recipe's 0 becomes 1.
"""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.trainer.checkpoint.test_elastic import load_and_check, save_and_continue
from tests.trainer.checkpoint.training import GLOBAL_BATCH, RATE, copied, make_engine, same, train
from tests.trainer.engine.test_optimizer import bad_step
from tests.trainer.ranks import Ranks

pytestmark = pytest.mark.gpu

STEPS = 20
NEAR_FP32 = 0.03  # of losses of about 1.4; on a CPU they are 0.005 apart
NEAR = 0.01  # of losses in bf16 where only the order of sums in fp32 differs; on a CPU 0.001


def losses(stage: int, precision: str, **fields: object) -> list[float]:
    return train(make_engine(stage, precision=precision, **fields), 0, STEPS)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_losses_in_bf16_are_near_those_in_fp32(rank: Ranks, stage: int) -> None:
    (exact,), (rounded,) = rank.run(losses, 0, "fp32"), rank.run(losses, stage, "bf16")
    torch.testing.assert_close(rounded, exact, atol=NEAR_FP32, rtol=0)
    assert rounded != exact


@pytest.mark.parametrize(
    ("stage", "precision", "bound"),
    [(0, "fp32", 1e-4), (3, "fp32", 1e-4), (1, "bf16", NEAR), (2, "bf16", NEAR), (3, "bf16", NEAR)],
)
def test_one_kernel_for_the_update_gives_the_same_losses(
    rank: Ranks, stage: int, precision: str, bound: float
) -> None:
    (fused,), (single,) = (
        rank.run(partial(losses, fused=fused), stage, precision) for fused in (True, False)
    )
    torch.testing.assert_close(fused, single, atol=bound, rtol=0)


@pytest.mark.parametrize(
    ("stage", "new_stage"),
    [(1, 1), (2, 2), (3, 3), (1, 3), (3, 2)],
    ids=lambda stage: f"zero-{stage}",
)
def test_training_continues_from_a_checkpoint(
    rank: Ranks, tmp_path: Path, stage: int, new_stage: int
) -> None:
    """Bit for bit at the same stage; every shard of the state is as it was saved at any."""
    (saved,) = rank.run(partial(save_and_continue, precision="bf16"), tmp_path, stage)
    (went_on,) = rank.run(partial(load_and_check, precision="bf16"), saved.path, new_stage)
    if stage == new_stage:
        assert went_on == saved.after
    torch.testing.assert_close(went_on, saved.after, atol=NEAR, rtol=0)


@pytest.mark.parametrize(
    ("stage", "precision", "poison", "fused"),
    [
        (0, "fp32", "clips", True),
        (1, "bf16", "clips", True),
        (1, "bf16", "loss", False),
        (2, "bf16", "clips", True),
        (3, "bf16", "loss", True),
    ],
)
def test_a_gradient_that_is_not_finite_changes_nothing(
    rank: Ranks, stage: int, precision: str, poison: str, fused: bool
) -> None:
    assert rank.run(bad_step, stage, precision, 1.0, poison, 0, fused) == [[]]


def unlike_master_weights(stage: int) -> tuple[list[str], bool]:
    """Exported weights that are not the optimiser's; whether any of them could not be a bf16 number."""
    engine = make_engine(stage, precision="bf16")
    train(engine, 0, 2)
    exported, found = engine.gather_weights(), []
    for key, values in copied(engine).items():
        kind, _, name = key.partition("/")
        if kind == "weight" and not same(exported[name].view(-1), values.float().cpu()):
            found.append(name)
    exact = any(not torch.equal(weight, weight.bfloat16().float()) for weight in exported.values())
    return found, exact


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_exported_weights_are_the_master_weights_in_fp32(rank: Ranks, stage: int) -> None:
    assert rank.run(unlike_master_weights, stage) == [([], True)]


def losses_of_parts(parts: int) -> list[float]:
    """Of steps over the same clips, in so many micro-batches each."""
    engine = make_engine(1, precision="bf16", form="scene", accumulation=parts)
    found = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        clips = torch.randn(GLOBAL_BATCH, 3, 4, 16, 16, generator=generator).to(engine.device)
        keys = torch.arange(GLOBAL_BATCH, device=engine.device)
        total = 0.0
        for own in keys.split(GLOBAL_BATCH // parts):
            loss = F.cross_entropy(engine.forward(clips[own], own), own % 4)
            engine.backward(loss)
            engine.step(RATE)
            total += float(loss.detach()) / parts
        found.append(total)
    return found


def test_gradients_of_micro_batches_add_up_in_fp32(rank: Ranks) -> None:
    (whole,), (in_parts,) = rank.run(losses_of_parts, 1), rank.run(losses_of_parts, GLOBAL_BATCH)
    torch.testing.assert_close(in_parts, whole, atol=NEAR, rtol=0)


def bits(stage: int, precision: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    engine = make_engine(stage, precision=precision)
    return train(engine, 0, STEPS), {key: values.cpu() for key, values in copied(engine).items()}


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16")])
def test_a_deterministic_engine_gives_the_same_bits_twice(rank: Ranks, stage: int, precision: str) -> None:
    (first,), (second,) = rank.run(bits, stage, precision), rank.run(bits, stage, precision)
    assert first[0] == second[0]
    assert [key for key, values in first[1].items() if not same(values, second[1][key])] == []
