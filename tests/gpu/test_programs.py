"""Programs on a GPU: a run without enough memory, the trial of the decoder, the preflight."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import MotionSet
from tests.gpu.test_run import on_gpu
from tests.integration.processes import ROOT, python_path, train

pytestmark = pytest.mark.gpu

PATIENCE = 60  # seconds


def test_too_little_memory_has_a_message(motion_set: MotionSet, tmp_path: Path) -> None:
    large = {"resolution": 448, "width": 256, "depth": 6}
    overrides = {f"model__overrides.{name}": value for name, value in large.items()}
    outcome = train(
        tmp_path / "run",
        *on_gpu(engine__micro_batch=8, engine__zero_stage=1, engine__recomputed_blocks=0, **overrides),
        data=motion_set.root,
        script=Path(__file__).with_name("with_little_memory.py"),
        variables=python_path(),
    )
    assert outcome.code == 2, outcome.errors
    assert "out of memory with 8 clips per rank" in outcome.errors
    assert "engine.micro_batch" in outcome.errors and "Traceback" not in outcome.errors


def typed(*command: str, folder: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False
    )


def test_nvdec_decodes_a_trial_clip(device: torch.device) -> None:
    result = typed("-m", "pipelines.dali.selftest", str(device))
    assert (result.returncode, result.stdout.strip()) == (0, '{"frames": 16}'), result.stderr


def test_the_preflight_finds_this_gpu_sound(tmp_path: Path) -> None:
    result = typed("launch/doctor.py", "--folder", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "NVDEC" in result.stdout


def test_the_preflight_misses_gpus_that_are_not_there(tmp_path: Path) -> None:
    result = typed("launch/doctor.py", "--folder", str(tmp_path), "--gpus-per-node", "9")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "9" in result.stdout
