"""The engine under a real DeepSpeed, one rank on the CPU; two ranks are in tests/integration."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from models import create_model
from trainer import RunError
from trainer.engine.engine import Engine, choose_precision, connect, disconnect
from trainer.engine.layout import Layout
from trainer.environment import Environment, find_environment
from trainer.recipe.schema import Recipe

SMALL = {"resolution": 16, "patch_size": 8, "width": 16, "depth": 2, "heads": 2, "global_layers": (1,)}


@pytest.fixture(scope="module")
def alone() -> Iterator[Environment]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, "")  # so that what is set meanwhile is gone again afterwards
            patch.delenv(name)
        environment = find_environment("cpu")
        connect(environment)
        yield environment
        disconnect()


def engine(alone: Environment, *, stage: int, precision: str = "fp32", accumulation: int = 1) -> Engine:
    recipe = Recipe.model_validate(
        {
            "name": "test",
            "model": {"preset": "tiny", "form": "temporal", "frames": 4},
            "data": {"train": "a", "val": "b"},
            "optimisation": {
                "global_batch": 4 * accumulation,
                "steps": 5,
                "learning_rate": 1e-2,
                "clip_norm": 1,
            },
            "engine": {"zero_stage": stage, "precision": precision},
        }
    )
    torch.manual_seed(0)
    model = create_model("tiny", form="temporal", frames=4, num_classes=4, head_dropout=0.3, **SMALL)
    made = Engine(model, recipe, alone, Layout(stage, 4, accumulation, recomputed_blocks=0))
    made.train()
    return made


def clips(seed: int) -> torch.Tensor:
    return torch.randn(4, 3, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


def steps(made: Engine, count: int) -> list[float]:
    """Train on fixed clips, with dropout; returns the losses."""
    losses = []
    for seed in range(count * made.accumulation):
        loss = F.cross_entropy(made.forward(clips(seed)), torch.arange(4))
        made.backward(loss)
        made.step(1e-2)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("precision", ["fp32", "autocast"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_happens_without_trace_leaves_none(alone: Environment, stage: int, precision: str) -> None:
    def run(rehearsed: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
        made = engine(alone, stage=stage, precision=precision, accumulation=2)
        if rehearsed:
            with made.without_trace():
                for _ in range(2):
                    made.backward(F.cross_entropy(made.forward(clips(99)), torch.arange(4)) * 0.0)
                    made.step(0.0)
        return steps(made, 3), made.weights()

    (plain_losses, plain), (losses, weights) = run(False), run(True)
    assert losses == plain_losses
    assert losses[-1] != losses[0]
    for name, tensor in plain.items():
        assert torch.equal(tensor, weights[name]), name


def test_stages_agree_and_keep_the_gradient_norm(alone: Environment) -> None:
    results = {}
    for stage in range(4):
        made = engine(alone, stage=stage)
        losses = steps(made, 4)
        norm = made.gradient_norm()
        assert norm is not None
        results[stage] = (losses, float(norm))
        assert {group["lr"] for group in made.deepspeed.optimizer.param_groups} == {1e-2}
    for stage in (1, 2, 3):
        torch.testing.assert_close(results[stage][0], results[0][0], atol=1e-5, rtol=0)
        assert results[stage][1] == pytest.approx(results[0][1], rel=1e-4)


def test_precision_follows_the_device() -> None:
    assert choose_precision("auto", torch.device("cuda")) == "bf16"
    assert choose_precision("auto", torch.device("cpu")) == "fp32"
    with pytest.raises(RunError, match="bf16 needs a GPU"):
        choose_precision("bf16", torch.device("cpu"))
