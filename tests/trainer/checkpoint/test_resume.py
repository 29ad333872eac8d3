"""Resuming with the same ranks and stage: bit for bit equal in every precision."""

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from tests.trainer.checkpoint.training import (
    Form,
    checkpoints,
    copied,
    differences,
    make_engine,
    model_weights,
    save,
    train,
)
from tests.trainer.ranks import Ranks
from trainer.checkpoint.restore import read_for_resume, restore


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


def resume_and_compare(folder: Path, stage: int, precision: str, form: Form, fp8: bool = False) -> None:
    # The program refuses bf16 on a CPU because batch norm fails in it; the scene form has no batch norm.
    with mock.patch("trainer.engine.deepspeed_engine.choose_precision", lambda wanted, device: wanted):
        engine = make_engine(stage, precision=precision, form=form, fp8=fp8)
        train(engine, 0, 3)
        checkpointer = checkpoints(folder)
        path = save(engine, checkpointer, 3)
        losses = train(engine, 3, 3)
        fresh = make_engine(stage, seed=1, precision=precision, form=form, fp8=fp8)
    # As the dry run before a training: with autocast, stage 3 gathers some weights in bf16 in the first pass
    # only.
    train(fresh, 0, 1)
    assert differences(copied(engine), copied(fresh))
    restore(fresh, path, read_for_resume(path, settings={}, allowed=()))
    assert fresh.updates == 3
    assert train(fresh, 3, 3) == losses
    assert fresh.updates == 6
    assert differences(copied(engine), copied(fresh)) == []
    assert differences(model_weights(engine), model_weights(fresh)) == []


@pytest.mark.parametrize(
    ("precision", "form", "stage"),
    [
        *(("fp32", "temporal", stage) for stage in (0, 3)),
        ("autocast", "temporal", 3),
        ("bf16", "scene", 2),
        *(pytest.param("fp32", "temporal", stage, marks=pytest.mark.soak) for stage in (1, 2)),
        *(pytest.param("autocast", "temporal", stage, marks=pytest.mark.soak) for stage in (0, 1, 2)),
        # A run in bf16 has at least stage 1.
        *(pytest.param("bf16", "scene", stage, marks=pytest.mark.soak) for stage in (1, 3)),
    ],
)
def test_a_resumed_training_is_equal(
    two: Ranks, tmp_path: Path, stage: int, precision: str, form: Form
) -> None:
    two.run(resume_and_compare, tmp_path, stage, precision, form)


def start_average_late(folder: Path, stage: int) -> None:
    engine = make_engine(stage, ema_decay=None)
    train(engine, 0, 2)
    checkpointer = checkpoints(folder)
    path = save(engine, checkpointer, 2)
    fresh = make_engine(stage, seed=1, ema_decay=0.9)
    restore(fresh, path, read_for_resume(path, settings={}, allowed=()))
    held = copied(fresh)
    averaged = {
        key.removeprefix("average/"): held.pop(key) for key in list(held) if key.startswith("average/")
    }
    assert {"weight/head.weight", "buffer/blocks.0.local_1.norm.running_mean"} & set(averaged)
    assert differences(averaged, {key: held[key].float() for key in averaged}) == []
    assert differences(copied(engine), held) == []
    train(fresh, 2, 1)
    after = copied(fresh)
    assert any(key.startswith("average/") and not after[key].equal(averaged[key[8:]]) for key in after)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_new_average_starts_as_the_weights(two: Ranks, tmp_path: Path, stage: int) -> None:
    two.run(start_average_late, tmp_path, stage)


def test_a_training_with_products_in_fp8_resumes_with_the_same_losses(two: Ranks, tmp_path: Path) -> None:
    two.run(resume_and_compare, tmp_path, 1, "fp32", "temporal", True)
