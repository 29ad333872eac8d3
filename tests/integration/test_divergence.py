"""A training that diverges: its weights are neither saved nor exported, and it exits with code 2."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import MotionSet
from tests.integration.processes import ROOT, Outcome, Training, events, losses, settings, train
from trainer.resilience.signals import REQUEUE

pytestmark = pytest.mark.soak

HERE = Path(__file__).parent
OFTEN = settings(run__checkpoint_every_steps=2, run__keep_last=2, run__keep_best="false")


def diverge(run_dir: Path, data: Path, *, first: int, leaves_after: int = 0, ranks: int = 1) -> Outcome:
    """A start with a learning rate that is 1e30 times too high from step `first` on, counted from 0."""
    variables = {
        "PYTHONPATH": str(ROOT),
        "WILD_FROM": str(first),
        "WILD_LEAVES_AFTER": str(leaves_after),
    }
    clip = settings(optimisation__clip_norm="null")
    arguments = [*clip, *OFTEN]
    script = HERE / "wild_rate.py"
    return Training(run_dir, *arguments, data=data, ranks=ranks, script=script, variables=variables).wait()


def kept(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir() if path.is_dir())


def test_a_preempted_run_that_diverges_keeps_its_good_checkpoints_and_stops(
    motion_set: MotionSet, tmp_path: Path
) -> None:
    """Steps 1 to 4 are good, the fifth ruins the weights. Ten steps may be skipped. Each preempted start
    skips some steps, so that the third start stops.
    """
    good, run_dir = tmp_path / "good", tmp_path / "run"
    clip = settings(optimisation__clip_norm="null")
    assert train(good, *clip, data=motion_set.root).code == 0
    for _ in range(2):
        outcome = diverge(run_dir, motion_set.root, first=4, leaves_after=1)
        assert outcome.code == REQUEUE, outcome.errors
        printed = outcome.output + outcome.errors
        assert "All is saved" not in printed
        assert "its weights are not saved; the last checkpoint is of step 4" in " ".join(printed.split())
        assert kept(run_dir) == ["step-0000002", "step-0000004"]
        assert json.loads((run_dir / "skipped.json").read_text())["count"] == len(events(run_dir, "skipped"))
    outcome = diverge(run_dir, motion_set.root, first=4)
    assert outcome.code == 2, outcome.errors
    assert "the last checkpoint is of step 4" in " ".join(outcome.errors.split()).lower()
    assert "Traceback" not in outcome.errors
    assert len(events(run_dir, "skipped")) == 11
    assert kept(run_dir) == ["step-0000002", "step-0000004"]
    assert not (run_dir / "weights.safetensors").exists()
    # The kept checkpoints are good: with the normal rate the run ends as one that never diverged.
    outcome = train(run_dir, *clip, *OFTEN, data=motion_set.root)
    assert outcome.code == 0, outcome.errors
    assert losses(run_dir)[-16:] == losses(good)[-16:]
    weights, expected = (load_file(folder / "weights.safetensors") for folder in (run_dir, good))
    assert weights.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(weights[name], tensor)] == []
    assert kept(run_dir) == ["step-0000018", "step-0000020"]


def test_a_nonfinite_last_step_is_an_error(motion_set: MotionSet, tmp_path: Path) -> None:
    outcome = diverge(tmp_path, motion_set.root, first=18, ranks=2)
    assert outcome.code == 2, outcome.errors
    message = " ".join(outcome.errors.split())
    assert "the last step, 20, changed nothing" in message
    assert "the last checkpoint is of step 18" in message
    assert kept(tmp_path) == ["step-0000016", "step-0000018"]
    assert not (tmp_path / "weights.safetensors").exists() and not (tmp_path / "summary.json").exists()


def test_weights_ruined_by_the_last_step_are_found_in_the_evaluation(
    motion_set: MotionSet, tmp_path: Path
) -> None:
    outcome = diverge(tmp_path, motion_set.root, first=19)
    assert outcome.code == 2, outcome.errors
    assert "the model's outputs are not finite for 16 of 16 validation videos" in " ".join(
        outcome.errors.split()
    )
    assert kept(tmp_path) == ["not-finite-step-0000020", "step-0000016", "step-0000018"]
    assert not (tmp_path / "weights.safetensors").exists()
