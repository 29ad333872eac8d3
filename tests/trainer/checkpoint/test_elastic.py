"""Resuming with another number of ranks and another ZeRO stage: equal state and equal losses.

Each number of ranks is one set of processes, which saves in every stage and then loads the saves of all.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.checkpoint.training import (
    LAYER_DECAY,
    WEIGHT_DECAY,
    checkpoints,
    copied,
    differences,
    make_engine,
    make_model,
    model_weights,
    same,
    save,
    train,
)
from tests.trainer.ranks import Ranks
from trainer.checkpoint.metadata import shards
from trainer.checkpoint.restore import read_for_resume, restore
from trainer.checkpoint.shards import ShardReader, read_index
from trainer.engine.deepspeed_engine import Engine
from trainer.engine.optimizer import parameter_groups

WORLDS = (1, 2, 4)
STAGES = (0, 1, 2, 3)
BEFORE, AFTER = 3, 2  # steps
REPRESENTATIVE = [
    "1/0 to 2/1", "1/3 to 2/3", "2/2 to 1/2", "2/3 to 1/0",
]  # fmt: skip


@dataclass(frozen=True)
class Saved:
    path: Path
    after: list[float]
    """Losses of the steps after it, in the same process."""


def save_and_continue(folder: Path, stage: int, **how: Any) -> Saved:
    engine = make_engine(stage, **how)
    train(engine, 0, BEFORE)
    path = save(engine, checkpoints(folder), BEFORE)
    return Saved(path, train(engine, BEFORE, AFTER))


def load_and_check(path: Path, stage: int, **how: Any) -> list[float]:
    """Losses of the steps after a checkpoint, loaded in the new `stage`."""
    engine = make_engine(stage, seed=1, **how)
    fresh = copied(engine)
    state = read_for_resume(path, settings={}, allowed=(), verify=True)
    restore(engine, path, state)
    stored = ShardReader(read_index(shards(path, state)))
    changed = set(differences(fresh, copied(engine)))
    for piece in engine.state_shards():
        whole = stored.whole(piece.key)
        assert same(whole.view(-1)[piece.start : piece.start + piece.count], piece.values.cpu()), piece.key
        # A tensor that equals that of a fresh model could have been left out.
        assert piece.key in changed or float(whole.double().sum()) in (0, piece.count), piece.key
    held = {piece.key for piece in engine.state_shards()}
    if stage == 0:
        assert held == set(stored.index)
    for name, weight in model_weights(engine).items():
        assert same(weight.cpu(), stored.whole(f"weight/{name}").to(weight.dtype)), name
    check_optimiser(engine, BEFORE)
    return train(engine, BEFORE, AFTER)


def check_optimiser(engine: Engine, updates: int) -> None:
    steps = [state["step"] for state in engine.deepspeed.basic_optimizer.state.values()]
    assert [float(step) for step in steps] == [updates] * len(steps)
    assert len({step.data_ptr() for step in steps}) == len(steps), "states share one count"
    of_model = parameter_groups(make_model(), WEIGHT_DECAY, LAYER_DECAY)
    wanted = [(group["weight_decay"], group["lr_scale"]) for group in of_model]
    assert len(wanted) > 3
    for optimiser in (engine.deepspeed.optimizer, engine.deepspeed.basic_optimizer):
        assert [(group["weight_decay"], group["lr_scale"]) for group in optimiser.param_groups] == wanted


@dataclass(frozen=True)
class Family:
    """Sets of ranks by world size, and their saves."""

    ranks: dict[int, Ranks]
    root: Path
    saved: dict[tuple[int, int], Saved]

    def saved_by(self, world_size: int, stage: int) -> Saved:
        if (world_size, stage) not in self.saved:
            folder = self.root / f"{world_size}-{stage}"
            self.saved[world_size, stage] = self.ranks[world_size].run(save_and_continue, folder, stage)[0]
        return self.saved[world_size, stage]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    with ExitStack() as stack:
        ranks = {world_size: stack.enter_context(Ranks(world_size)) for world_size in WORLDS}
        yield Family(ranks, tmp_path_factory.mktemp("elastic"), {})


def transitions() -> list[object]:
    found: list[object] = []
    for world, stage, new_world, new_stage in product(WORLDS, STAGES, WORLDS, STAGES):
        name = f"{world}/{stage} to {new_world}/{new_stage}"
        marks = [] if name in REPRESENTATIVE else [pytest.mark.soak]
        found.append(pytest.param(world, stage, new_world, new_stage, id=name, marks=marks))
    return found


@pytest.mark.parametrize(("world", "stage", "new_world", "new_stage"), transitions())
def test_any_ranks_and_stage_resume_with_the_same_losses(
    family: Family, world: int, stage: int, new_world: int, new_stage: int
) -> None:
    saved = family.saved_by(world, stage)
    undisturbed = family.saved_by(1, 0).after
    for losses in family.ranks[new_world].run(load_and_check, saved.path, new_stage):
        torch.testing.assert_close(losses, undisturbed, atol=1e-5, rtol=0)
        if (world, stage) == (new_world, new_stage):
            assert losses == saved.after
