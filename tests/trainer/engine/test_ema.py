"""The EMA of the weights: its formula on any ranks and stage; evaluating it changes nothing."""

from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.trainer.checkpoint.training import copied, differences, make_engine, model_weights, train
from tests.trainer.ranks import Ranks
from trainer.engine.ema import Ema
from trainer.engine.state_shards import StateShard

# A bias of keys, or before a batch norm, has a gradient of zero; AdamW makes whole steps of its rounding.
ROUNDING_ONLY = ("qkv.bias", "in_proj_bias", "expand.bias", "reduce.bias", "temporal.bias")


@pytest.fixture(scope="module")
def ranks() -> Iterator[dict[int, Ranks]]:
    with ExitStack() as stack:
        yield {world_size: stack.enter_context(Ranks(world_size)) for world_size in (1, 2)}


def piece(key: str, values: Tensor) -> StateShard:
    return StateShard(key, 0, values, tuple(values.shape), replicated=True)


@pytest.mark.parametrize("decay", [0.0, 0.15, 0.3, 0.999])
def test_it_follows_the_formula(decay: float) -> None:
    generator = np.random.default_rng(0)
    weight, count = torch.zeros(5), torch.zeros(1, dtype=torch.int64)
    first = generator.standard_normal(5)
    weight.copy_(torch.from_numpy(first))
    average = Ema(
        [piece("weight/w", weight), piece("exp_avg/w", torch.ones(5)), piece("buffer/count", count)], decay
    )
    assert [held.key for held in average.shards] == ["average/weight/w"]
    expected = first.astype(np.float32).astype(np.float64)
    for steps in range(1, 30):
        weight.copy_(torch.from_numpy(generator.standard_normal(5)))
        average.update(steps)
        d = min(decay, (1 + steps) / (10 + steps))
        expected = d * expected + (1 - d) * weight.double().numpy()
        np.testing.assert_allclose(average.shards[0].values.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_bf16_weights_are_averaged_in_fp32() -> None:
    weight = torch.ones(1, dtype=torch.bfloat16)
    average = Ema([piece("weight/w", weight)], 0.999)
    weight.fill_(2.0)
    for steps in range(10_000, 10_010):
        average.update(steps)
    assert average.shards[0].values.item() == pytest.approx(2 - 0.999**10, rel=1e-5)
    with average.in_place():
        assert weight.item() == average.shards[0].values.bfloat16().item()
    assert weight.item() == 2.0


def test_an_error_inside_restores_the_weights() -> None:
    weight = torch.ones(2)
    average = Ema([piece("weight/w", weight)], 0.9)
    weight.fill_(2.0)
    with pytest.raises(ZeroDivisionError), average.in_place():
        assert torch.equal(weight, torch.ones(2))
        raise ZeroDivisionError
    assert torch.equal(weight, torch.full((2,), 2.0))


def follow(stage: int) -> tuple[dict[str, np.ndarray], float]:
    """The model's averaged weights after a few steps, and how far they are from a reference made of the
    model's weights after each step.
    """
    engine = make_engine(stage, ema_decay=0.3)

    def now() -> dict[str, Tensor]:
        buffers = {name: buffer.clone() for name, buffer in engine.model.named_buffers()}
        return {**model_weights(engine), **buffers}

    expected = {name: tensor.double() for name, tensor in now().items()}
    for step in range(4):
        train(engine, step, 1)
        d = min(0.3, (2 + step) / (11 + step))
        for name, tensor in now().items():
            if tensor.is_floating_point():
                expected[name] = d * expected[name] + (1 - d) * tensor.double()
    with engine.ema_weights():
        averaged = {name: tensor for name, tensor in now().items() if tensor.is_floating_point()}
    farthest = max(float((tensor - expected[name]).abs().max()) for name, tensor in averaged.items())
    return {name: tensor.numpy() for name, tensor in averaged.items()}, farthest


@pytest.mark.parametrize("stages", [(0, 3), pytest.param((1, 2), marks=pytest.mark.soak)], ids=str)
def test_any_ranks_and_stage_have_the_same_average(ranks: dict[int, Ranks], stages: tuple[int, int]) -> None:
    of_one, _ = ranks[1].run(follow, 0)[0]
    assert "blocks.0.local_1.norm.running_var" in of_one
    for world_size in (1, 2):
        for stage in stages:
            for averaged, farthest in ranks[world_size].run(follow, stage):
                assert farthest < 1e-6
                assert averaged.keys() == of_one.keys()
                for name, tensor in averaged.items():
                    if not name.endswith(ROUNDING_ONLY):
                        np.testing.assert_allclose(tensor, of_one[name], atol=1e-5, err_msg=name)


def evaluate_with_it(stage: int, precision: str) -> None:
    """An engine that evaluates its EMA during training, compared with one that does not."""
    plain, evaluating = (make_engine(stage, precision=precision) for _ in range(2))
    for engine in (plain, evaluating):
        train(engine, 0, 2)
    before, weights = copied(evaluating), model_weights(evaluating)
    clips = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    logits = []
    for averaged in (False, True):
        for engine in (plain, evaluating):
            engine.eval()
        with torch.no_grad():
            if averaged:
                with evaluating.ema_weights():
                    logits.append(evaluating.forward(clips))
                    assert differences(weights, model_weights(evaluating))
            else:
                logits.append(evaluating.forward(clips))
            plain.forward(clips)
        for engine in (plain, evaluating):
            engine.train()
    assert not torch.equal(*logits), "the average was not evaluated"
    assert differences(before, copied(evaluating)) == []
    assert differences(weights, model_weights(evaluating)) == []
    assert train(plain, 2, 2) == train(evaluating, 2, 2)
    assert differences(copied(plain), copied(evaluating)) == []


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "autocast"), (2, "fp32"), (3, "fp32"), (3, "autocast")]
)
def test_evaluating_it_changes_nothing_in_the_training(
    ranks: dict[int, Ranks], stage: int, precision: str
) -> None:
    ranks[2].run(evaluate_with_it, stage, precision)
