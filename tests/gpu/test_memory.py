"""The memory estimate compared with PyTorch's allocations on a GPU."""

import gc

import pytest
import torch
import torch.nn.functional as F

from models import UniFormerV2, build_config
from tests.trainer.checkpoint.training import environment_here
from tests.trainer.ranks import Ranks
from trainer.config.schema import Recipe
from trainer.engine.batch_plan import BatchPlan
from trainer.engine.deepspeed_engine import Engine
from trainer.engine.memory_estimate import MemoryModel

pytestmark = pytest.mark.gpu

CLIPS = 4
# Too low an estimate ends a run at its first step, too high a one wastes memory.
LOWEST, HIGHEST = 0.9, 1.35


def estimate_by_measured(stage: int, recomputed_blocks: int) -> float:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    recipe = Recipe.model_validate(
        {
            "name": "test",
            "model": {"preset": "b16", "form": "scene", "frames": 8},
            "data": {"train": "a", "val": "b"},
            "optimisation": {"global_batch": 2 * CLIPS, "steps": 5, "learning_rate": 1e-3},
            "engine": {"zero_stage": stage, "precision": "bf16"},
            "evaluation": {"batch": 1},
        }
    )
    fields = {"form": "scene", "frames": 8, "num_classes": 400, "recomputed_blocks": recomputed_blocks}
    config = build_config("b16", **fields)
    engine = Engine(
        UniFormerV2(config), recipe, environment_here(), BatchPlan(stage, CLIPS, 2, recomputed_blocks)
    )
    engine.train()
    clips = torch.randn(CLIPS, 3, 8, config.resolution, config.resolution, device=engine.device)
    labels = torch.arange(CLIPS, device=engine.device)
    for _ in range(4):
        engine.backward(F.cross_entropy(engine.forward(clips, labels), labels))
        engine.step(1e-4)
    measured = torch.cuda.max_memory_allocated() - before
    needs = MemoryModel.of(recipe, config, ranks=1, precision="bf16", kind=engine.device.type)  # type: ignore[arg-type]
    estimate = needs.estimate(zero_stage=stage, micro_batch=CLIPS, recomputed_blocks=recomputed_blocks)
    return (estimate.total - estimate.reserve - estimate.clips + clips.nbytes) / measured


@pytest.mark.parametrize(("stage", "recomputed_blocks"), [(1, 0), (2, 0), (3, 0), (1, 12)])
def test_the_estimate_is_near_what_is_allocated(rank: Ranks, stage: int, recomputed_blocks: int) -> None:
    (ratio,) = rank.run(estimate_by_measured, stage, recomputed_blocks)
    rank.end()  # DeepSpeed keeps much of an engine that is gone
    assert LOWEST < ratio < HIGHEST
