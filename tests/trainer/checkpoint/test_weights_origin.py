"""A resumed run must name the starting weights that its checkpoint records."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from trainer.checkpoint.metadata import WEIGHTS, TrainState
from trainer.checkpoint.weights_origin import check_settings_unchanged, recorded, weights_origin_of
from trainer.errors import RunError

STATE = TrainState(
    step=1, updates=1, world_size=1, zero_stage=0, settings={"seed": 1}, clips=0, bad=0, spent={},
    saved_at=0.0, description={},
)  # fmt: skip


def started_from(weights: Path | None) -> TrainState:
    return dataclasses.replace(STATE, settings={"seed": 1, WEIGHTS: weights_origin_of(weights)})


def check_resume(state: TrainState, weights: Path | None, allowed: Any = ()) -> None:
    named = None if weights is None else {"file": str(weights), "sha256": None}
    check_settings_unchanged(Path("step-1"), state, {"seed": 1, WEIGHTS: named}, allowed)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"one")
    return path


def test_a_moved_or_deleted_file_is_accepted(weights: Path) -> None:
    state = started_from(weights)
    check_resume(state, weights)
    moved = weights.rename(weights.with_name("moved"))
    check_resume(state, weights)
    check_resume(state, moved)
    check_resume(started_from(None), None)


def test_other_weights_are_refused_by_name(weights: Path) -> None:
    state = started_from(weights)
    other = weights.with_name("other")
    for name in (None, other):
        with pytest.raises(RunError, match=r"--allow-change 'model\.weights'") as refused:
            check_resume(state, name)
        assert str(weights) in str(refused.value)
    other.write_bytes(b"two")
    with pytest.raises(RunError, match="other"):
        check_resume(state, other)
    check_resume(state, other, [WEIGHTS])
    with pytest.raises(RunError, match="null then"):
        check_resume(started_from(None), other)


def test_checkpoints_of_earlier_versions_have_the_path_in_their_recipe(weights: Path) -> None:
    recipe = {"model": {"image_weights": str(weights)}}
    state = dataclasses.replace(STATE, description={"recipe": recipe})
    assert recorded(state) == {"file": str(weights), "sha256": None}
    check_resume(state, weights)
    check_resume(STATE, None)
    with pytest.raises(RunError, match=r"model\.weights"):
        check_resume(state, None)
