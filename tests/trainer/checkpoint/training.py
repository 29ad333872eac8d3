"""A small training with equal results on any number of ranks, and all state that checkpoints hold.

Batch norm over all ranks, dropout and drop-path keyed by clip, groups of differing weight decay and learning
rate, a frozen parameter, accumulation, clipping, an average of the weights.
"""

from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models import create_model
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.metadata import Progress
from trainer.checkpoint.retention import Retention
from trainer.config.schema import Recipe
from trainer.distributed.environment import Environment, find_environment
from trainer.engine.batch_plan import BatchPlan
from trainer.engine.deepspeed_engine import Engine

GLOBAL_BATCH = 8
ACCUMULATION = 2
RATE = 1e-2
FROZEN = "class_token"
WEIGHT_DECAY = 0.05
LAYER_DECAY = 0.7

Form = Literal["temporal", "scene"]


def make_model(
    form: Form = "temporal", *, seed: int = 0, num_classes: int = 4, recomputed_blocks: int = 0
) -> nn.Module:
    torch.manual_seed(seed)
    model = create_model(
        "tiny",
        form=form,
        frames=4,
        num_classes=num_classes,
        head_dropout=0.3,
        drop_path=0.2,
        resolution=16,
        patch_size=8,
        width=16,
        depth=2,
        heads=2,
        global_layers=(1,),
        recomputed_blocks=recomputed_blocks,
    )
    model.get_parameter(FROZEN).requires_grad_(False)
    return model


def environment_here() -> Environment:
    """The environment of this rank in its process group."""
    return find_environment("cuda" if dist.get_backend() == "nccl" else "cpu")


class SmallEngine(Engine):
    """Stage 3 keeps the smallest parameters gathered and partitions the others, so both kinds are tested."""

    def _config(self, recipe: Recipe) -> dict[str, Any]:
        config = super()._config(recipe)
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 300
        return config


def make_engine(
    stage: int,
    *,
    seed: int = 0,
    precision: str = "fp32",
    form: Form = "temporal",
    clip_norm: float | None = 1.0,
    ema_decay: float | None = 0.9,
    num_classes: int = 4,
    recomputed_blocks: int = 0,
    accumulation: int = ACCUMULATION,
    **engine: Any,
) -> SmallEngine:
    """The engine of this rank. seed: of the initial weights. engine: fields of the recipe's section."""
    recipe = Recipe.model_validate(
        {
            "name": "test",
            "model": {"preset": "tiny", "form": form, "frames": 4},
            "data": {"train": "a", "val": "b"},
            "optimisation": {
                "global_batch": GLOBAL_BATCH,
                "steps": 9,
                "learning_rate": RATE,
                "clip_norm": clip_norm,
                "layer_decay": LAYER_DECAY,
                "weight_decay": WEIGHT_DECAY,
                "ema_decay": ema_decay,
            },
            "engine": {"precision": precision, **engine},
        }
    )
    micro_batch = GLOBAL_BATCH // dist.get_world_size() // accumulation
    model = make_model(form, seed=seed, num_classes=num_classes, recomputed_blocks=recomputed_blocks)
    layout = BatchPlan(stage, micro_batch, accumulation, recomputed_blocks)
    made = SmallEngine(model, recipe, environment_here(), layout)
    made.train()
    return made


def train(engine: Engine, first: int, count: int, *, poisoned: dict[int, str] | None = None) -> list[float]:
    """Train `count` steps from `first`. Returns the loss of each over the global batch.

    poisoned: rank -> `clips` or `loss`, which has a NaN on this rank in each step.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    poison = (poisoned or {}).get(rank)
    losses = []
    for step in range(first, first + count):
        total = torch.zeros((), device=engine.device)
        for part in range(ACCUMULATION):
            generator = torch.Generator().manual_seed(100 * step + part)
            whole = GLOBAL_BATCH // ACCUMULATION
            clips = torch.randn(whole, 3, 4, 16, 16, generator=generator).to(engine.device)
            keys = torch.randint(2**62, (whole,), generator=generator).to(engine.device)
            own = slice(rank * whole // world_size, (rank + 1) * whole // world_size)
            batch = clips[own].clone()
            if poison == "clips" and part == 0:
                batch[0, 0, 0, 0, 0] = float("nan")
            labels = torch.arange(whole, device=engine.device)[own]
            each = F.cross_entropy(engine.forward(batch, keys[own]), labels, reduction="none")
            if poison == "loss" and part == 0:
                each = each * float("nan")
            engine.backward(each.mean())
            engine.step(RATE)
            total += each.detach().sum()
        dist.all_reduce(total)
        losses.append(float(total) / GLOBAL_BATCH)
    engine.finish_step()
    return losses


def checkpoints(folder: Path, *, keep_last: int = 3, keep_best: bool = True, **options: Any) -> Checkpointer:
    retention = Retention(folder, keep_last=keep_last, keep_best=keep_best)
    return Checkpointer(retention, **{"every_minutes": None, **options})


def progress_at(step: int) -> Progress:
    return Progress(step, step * GLOBAL_BATCH, 0, {})


def save(engine: Engine, checkpointer: Checkpointer, step: int) -> Path:
    """Save, wait for the save, and confirm it."""
    assert checkpointer.begin(engine, progress_at(step))
    saved = checkpointer.wait()
    assert saved is not None and saved.step == step
    checkpointer.confirm(step)
    return saved.path


def copied(engine: Engine) -> dict[str, Tensor]:
    """A copy of the state of this rank."""
    return {piece.key: piece.values.clone() for piece in engine.state_shards()}


def differences(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Keys of the tensors that are not bit for bit equal; NaN equals NaN."""
    assert before.keys() == after.keys()
    return [key for key, tensor in before.items() if not same(tensor, after[key])]


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are bit for bit equal."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def model_weights(engine: Engine) -> dict[str, Tensor]:
    """The weights that the model computes with, gathered if partitioned."""
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    found = {}
    for name, parameter in engine.model.named_parameters():
        # The next step uses what stage 3 keeps gathered; gathering it again would partition it at the end.
        if engine.zero_stage < 3 or parameter.ds_status is ZeroParamStatus.AVAILABLE:
            found[name] = parameter.detach().clone()
        else:
            with deepspeed.zero.GatheredParameters([parameter]):
                found[name] = parameter.detach().clone()
    return found
