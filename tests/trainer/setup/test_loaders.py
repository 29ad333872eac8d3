"""The loaders of a run: shared memory, and whether the run evaluates."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipelines.dali.shared_memory import SharedMemoryNeed
from pipelines.dataset.manifest import ManifestRow, write_manifest
from trainer.config.load import load_recipe
from trainer.distributed.environment import Environment
from trainer.engine.memory_estimate import GIB, AvailableMemory
from trainer.lr_schedule import Schedule
from trainer.monitoring.run_dir import RunDir
from trainer.setup import loaders
from trainer.setup.loaders import open_loaders
from trainer.setup.preparation import prepare

RECIPE = """\
name: test
model: {preset: tiny, form: scene, frames: 4, overrides: {resolution: 32, patch_size: 16}}
data: {train: train.arrow, val: val.arrow, workers: 1, threads: 1, prefetch: 1, decoder: pyav}
optimisation: {global_batch: 8, epochs: 2, learning_rate: 1e-3}
"""


@pytest.fixture
def one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Environment]:
    monkeypatch.chdir(tmp_path)
    for name in ("train", "val"):
        rows = (ManifestRow(f"{i}.mp4", 0, 0, i % 2, 10, 25.0, 64, 48, "vp9") for i in range(16))
        write_manifest(f"{name}.arrow", rows, ["jump", "run"])
    Path("recipe.yaml").write_text(RECIPE)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Environment(0, 0, 1, 1, "alone", "alone", device=torch.device("cpu"), node="node")
    dist.destroy_process_group()


def test_a_run_that_never_evaluates_needs_no_shared_memory_for_it(
    one_rank: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs: list[SharedMemoryNeed] = []
    check = loaders.check_shared_memory

    def noted(environment: Environment, train: SharedMemoryNeed, val: SharedMemoryNeed) -> str | None:
        needs.extend((train, val))
        return check(environment, train, val)

    monkeypatch.setattr(loaders, "check_shared_memory", noted)
    recipe = load_recipe("recipe.yaml", ["evaluation.at_end=false"])
    prepared = prepare(recipe, world_size=1, available=AvailableMemory("cpu", 16 * GIB))
    schedule = Schedule.of(recipe, prepared.sampler.steps_per_epoch)
    with ExitStack() as stack:
        folder = RunDir(tmp_path / "run")
        open_loaders(
            recipe, one_rank, prepared, folder, first_step=0, evaluates=schedule.evaluates, stack=stack
        )
    assert needs[0].least > 0
    assert needs[1] == SharedMemoryNeed(0, 0)


@pytest.mark.parametrize(
    ("settings", "evaluates"),
    [
        ([], True),
        (["evaluation.at_end=false"], False),
        (["evaluation.at_end=false", "evaluation.every_epochs=1"], True),
        (["evaluation.at_end=false", "evaluation.every_steps=3"], True),
        (["evaluation.at_end=false", "evaluation.every_steps=4"], False),  # the run has 4
    ],
)
def test_whether_a_run_evaluates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str], evaluates: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    schedule = Schedule.of(load_recipe("recipe.yaml", settings), steps_per_epoch=2)
    assert schedule.evaluates is evaluates
    assert any(map(schedule.evaluates_after, range(1, 5))) or schedule.recipe.evaluation.at_end is evaluates
