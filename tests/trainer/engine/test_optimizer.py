"""A gradient that is not finite on one of two ranks: both skip the step, and nothing changes."""

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import nn

from tests.trainer.checkpoint.training import copied, differences, make_engine, model_weights, train
from tests.trainer.ranks import Ranks
from trainer.engine.optimizer import SkippableAdamW


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


@pytest.mark.parametrize("fused", [False, True])
def test_the_optimiser_skips_nonfinite_steps(fused: bool) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    finite = torch.tensor(False)
    optimiser = SkippableAdamW([weight], lambda: finite, lr=0.1, fused=fused)
    weight.grad = torch.full((3,), float("nan"))
    optimiser.step()
    assert torch.equal(weight.detach(), torch.ones(3))
    for name, tensor in optimiser.state[weight].items():
        assert not tensor.any(), name
    weight.grad = torch.ones(3)
    finite.fill_(True)
    optimiser.step()
    assert not torch.equal(weight.detach(), torch.ones(3))
    assert float(optimiser.state[weight]["step"]) == 1


def test_an_update_on_a_cpu_does_not_depend_on_how_weights_are_shared() -> None:
    """A kernel that computes vectors rounds the elements that fill none differently."""
    weights, count = torch.randn(1000), 40

    def updated(*ends: int) -> dict[str, torch.Tensor]:
        pieces = [nn.Parameter(piece.clone()) for piece in weights.tensor_split(ends)]
        optimiser = SkippableAdamW(pieces, lambda: torch.tensor(True), lr=0.1, fused=True)
        draws = torch.Generator().manual_seed(0)
        for _ in range(count):
            gradient = torch.randn(1000, generator=draws)
            for piece, of_piece in zip(pieces, gradient.tensor_split(ends), strict=True):
                piece.grad = of_piece.clone()
            optimiser.step()
        states = [optimiser.state[piece] for piece in pieces]
        assert {float(state["step"]) for state in states} == {count}
        moments = {name: torch.cat([state[name] for state in states]) for name in ("exp_avg", "exp_avg_sq")}
        return {"weight": torch.cat([piece.detach() for piece in pieces]), **moments}

    whole = updated()
    for ends in ([500], [7, 16, 300, 301, 993]):
        for name, tensor in updated(*ends).items():
            assert torch.equal(tensor, whole[name]), (ends, name)
    expected = nn.Parameter(weights.clone())
    torchs = torch.optim.AdamW([expected], lr=0.1)
    draws = torch.Generator().manual_seed(0)
    for _ in range(count):
        expected.grad = torch.randn(1000, generator=draws)
        torchs.step()
    torch.testing.assert_close(whole["weight"], expected.detach())


def bad_step(
    stage: int, precision: str, clip_norm: float | None, poison: str, rank: int, fused: bool = False
) -> list[str]:
    """Differences between good, nonfinite, good and good, good; and between before and after a nonfinite
    step."""
    undisturbed = make_engine(stage, precision=precision, clip_norm=clip_norm, fused=fused)
    disturbed = make_engine(stage, precision=precision, clip_norm=clip_norm, fused=fused)
    found = []
    for engine in (undisturbed, disturbed):
        train(engine, 0, 2)
    before, weights = copied(disturbed), model_weights(disturbed)
    losses = train(disturbed, 7, 1, poisoned={rank: poison})
    assert losses[0] != losses[0], "the loss over all ranks is NaN"
    assert disturbed.updates == 2
    counts = {float(state["step"]) for state in disturbed.deepspeed.basic_optimizer.state.values()}
    assert counts == {2.0}
    found += [f"at once: {key}" for key in differences(before, copied(disturbed))]
    found += [f"at once: model's {name}" for name in differences(weights, model_weights(disturbed))]
    if train(undisturbed, 2, 2) != train(disturbed, 2, 2):
        found.append("later: losses")
    assert undisturbed.updates == disturbed.updates == 4
    found += [f"later: {key}" for key in differences(copied(undisturbed), copied(disturbed))]
    return found


ALL = list(product([0, 1, 2, 3], ["fp32", "autocast"], [1.0, None], ["clips", "loss"], [0, 1]))
REPRESENTATIVE = [
    (0, "fp32", 1.0, "clips", 1),
    (0, "autocast", None, "loss", 0),
    (1, "fp32", None, "loss", 1),
    (2, "fp32", None, "clips", 0),
    (2, "autocast", 1.0, "loss", 1),
    (3, "fp32", None, "clips", 1),
    (3, "autocast", 1.0, "loss", 0),
]


@pytest.mark.parametrize(
    ("stage", "precision", "clip_norm", "poison", "rank"),
    [pytest.param(*case, marks=[] if case in REPRESENTATIVE else pytest.mark.soak) for case in ALL],
)
def test_a_nonfinite_step_changes_nothing_on_any_rank(
    two: Ranks, stage: int, precision: str, clip_norm: float | None, poison: str, rank: int
) -> None:
    assert two.run(bad_step, stage, precision, clip_norm, poison, rank) == [[], []]


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "autocast"), (2, "fp32"), (3, "autocast")])
def test_a_nonfinite_step_that_the_device_skips_changes_nothing(
    two: Ranks, stage: int, precision: str
) -> None:
    assert two.run(bad_step, stage, precision, 1.0, "loss", 1, True) == [[], []]


def outcomes() -> list[bool | None]:
    engine = make_engine(2, fused=True)
    found = []
    for bad in (False, True, False):
        for _ in range(engine.accumulation):
            found.append(engine.finish_step())
            logits = engine.forward(torch.randn(2, 3, 4, 16, 16), torch.arange(2))
            engine.backward(logits.square().mean() * (float("inf") if bad else 1.0))
            engine.step(1e-3)
    return [*found, engine.finish_step(), engine.finish_step()]


def test_the_outcome_of_a_step_is_returned_once(two: Ranks) -> None:
    assert two.run(outcomes) == [[None, None, True, None, False, None, True, None]] * 2
