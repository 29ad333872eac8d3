"""Exports of a run with an EMA to a file of weights."""

import shutil
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import MotionSet
from tests.integration.processes import settings, train
from tests.launch.scripts import run_script
from trainer.checkpoint import export as exporting
from trainer.checkpoint.weights import load_weights
from trainer.errors import RunError

pytestmark = pytest.mark.soak  # all need a run


@pytest.fixture(scope="module")
def averaged(motion_set: MotionSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that evaluates and keeps an average of its weights."""
    run_dir = tmp_path_factory.mktemp("export") / "run"
    changes = settings(
        optimisation__ema_decay=0.9, optimisation__steps=8, engine__zero_stage=2, evaluation__every_steps=4,
        run__checkpoint_every_steps=4,
    )  # fmt: skip
    outcome = train(run_dir, *changes, data=motion_set.root, ranks=2)
    assert outcome.code == 0, outcome.errors
    return run_dir


def export(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run_script("export.py", *arguments)


def test_the_newest_checkpoint_gives_the_weights_of_the_run(averaged: Path, tmp_path: Path) -> None:
    result = export(averaged, "--out", tmp_path / "w.safetensors")
    assert result.returncode == 0, result.stderr
    assert "the weights after step 8, 8 classes" in result.stdout
    exported, written = load_file(tmp_path / "w.safetensors"), load_file(averaged / "weights.safetensors")
    assert exported.keys() == written.keys()
    for name, tensor in written.items():
        assert torch.equal(exported[name], tensor), name
    weights, own = load_weights(tmp_path / "w.safetensors"), load_weights(averaged / "weights.safetensors")
    assert weights.class_names == own.class_names and weights.class_names[0] == "move_left"
    assert weights.preprocessing == own.preprocessing
    assert weights.recipe["optimisation"]["ema_decay"] == 0.9


def test_the_last_weights_differ_from_their_average(averaged: Path, tmp_path: Path) -> None:
    assert export(averaged, "--last", "--out", tmp_path / "last.safetensors").returncode == 0
    last, average = load_file(tmp_path / "last.safetensors"), load_file(averaged / "weights.safetensors")
    assert last.keys() == average.keys()
    assert not torch.equal(last["head.weight"], average["head.weight"])


def test_a_single_checkpoint_and_the_best_one(averaged: Path, tmp_path: Path) -> None:
    first = averaged / "checkpoints" / "step-0000004"
    result = export(first, "--out", tmp_path / "first.safetensors")
    assert result.returncode == 0 and "after step 4" in result.stdout, result.stderr
    result = export(averaged, "--best", "--out", tmp_path / "best.safetensors")
    assert result.returncode == 0, result.stderr


def test_a_missing_or_damaged_source_is_refused(averaged: Path, tmp_path: Path) -> None:
    missing = export(tmp_path / "nowhere", "--out", tmp_path / "w.safetensors")
    assert missing.returncode == 2 and "nowhere: there is no such folder" in missing.stderr
    result = export(tmp_path, "--out", tmp_path / "w.safetensors")
    assert result.returncode == 2 and f"error: {tmp_path}" in result.stderr
    checkpoint = tmp_path / "step-0000008"
    subprocess.run(["cp", "-r", averaged / "checkpoints" / "step-0000008", checkpoint], check=True)
    shard = checkpoint / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    result = export(checkpoint, "--out", tmp_path / "w.safetensors")
    assert result.returncode == 2 and "shard-00001.safetensors is damaged" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "w.safetensors").exists()
    result = export(averaged, "--out", tmp_path / "nowhere" / "w.safetensors")
    assert result.returncode == 2 and "nowhere" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("before", ["read_state", "read_index"])
def test_a_checkpoint_deleted_during_the_export_is_an_error(
    averaged: Path, tmp_path: Path, before: str
) -> None:
    checkpoint = tmp_path / "checkpoints" / "step-0000008"
    shutil.copytree(averaged / "checkpoints" / "step-0000008", checkpoint)
    what_follows = getattr(exporting, before)

    def too_late(*arguments: object) -> object:
        shutil.rmtree(checkpoint)
        return what_follows(*arguments)

    words = f"{checkpoint} cannot be used: it was deleted while it was read"
    with mock.patch.object(exporting, before, too_late), pytest.raises(RunError, match=words):
        exporting.export(tmp_path, tmp_path / "w.safetensors")
    assert not (tmp_path / "w.safetensors").exists()
