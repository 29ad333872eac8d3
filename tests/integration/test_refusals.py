"""Mistakes are refused before the first step, in one message, with exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import MotionSet
from tests.integration.processes import ROOT, SMALL, python_path, settings, train

REFUSED = {
    "unknown field": ({"optimisation__learning_rat": 1}, ["optimisation.learning_rat", "learning_rate"]),
    "impossible batch": ({"optimisation__global_batch": 7}, ["global_batch 7", "2 ranks"]),
    "more classes than the model has": (
        {"model__num_classes": 5},
        ["8 classes", "model 5", "model.num_classes"],
    ),
    "frames the model cannot have": ({"model__form": "temporal", "model__frames": 5}, ["frames", "even"]),
    "frames in the wrong place": ({"model__overrides.frames": 8}, ["set model.frames instead"]),
}
# In the fast suite, tests/trainer/setup/test_preparation.py has the classes.
SLOW = (
    "impossible batch",
    "more classes than the model has",
    "frames the model cannot have",
    "frames in the wrong place",
)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.soak if case in SLOW else []) for case in REFUSED]
)
def test_refusal(case: str, motion_set: MotionSet, tmp_path: Path) -> None:
    changes, words = REFUSED[case]
    ranks = 2 if case == "impossible batch" else 1
    outcome = train(tmp_path / "run", *settings(**changes), data=motion_set.root, ranks=ranks)
    assert outcome.code == 2
    assert all(word in outcome.errors for word in words), outcome.errors
    assert "Traceback" not in outcome.errors
    assert not (tmp_path / "run").exists()


@pytest.mark.soak  # tests/pipelines/dataset/test_manifest.py has the message
def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    outcome = train(tmp_path / "run", data=tmp_path)
    assert outcome.code == 2
    assert f"no manifest at {tmp_path}/train.arrow" in outcome.errors
    assert "uniformerv2 prepare" in outcome.errors
    assert "Traceback" not in outcome.errors


def test_a_wrong_recipe_is_refused_before_torch_is_imported() -> None:
    """The import of torch takes seconds."""
    arguments = ["train.py", "--recipe", str(SMALL), "--set", "optimisation.steps=none"]
    code = (
        f"import sys, launch.train; sys.argv = {arguments!r}; code = launch.train.main(); "
        "print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=python_path(), capture_output=True, text=True, timeout=120
    )
    assert "optimisation.steps" in done.stderr
    assert done.stdout == "2 False\n"
