"""Programs on a GPU: a whole run, one without enough memory, the trial of the decoder, the preflight."""

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import MotionSet
from tests.integration.processes import ROOT, events, losses, settings, train
from trainer.meters import peak_flops

pytestmark = pytest.mark.gpu

PATIENCE = 60  # seconds


def on_gpu(**values: Any) -> Sequence[str]:
    """Settings of the small recipe for a GPU, in bf16."""
    return settings(engine__device="cuda", engine__precision="bf16", **{"data__decoder": "auto", **values})


def test_a_whole_run_in_bf16_ends_well(motion_set: MotionSet, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    asked = on_gpu(optimisation__steps=8, run__checkpoint_every_steps=4, engine__zero_stage=0)
    outcome = train(run_dir, *asked, data=motion_set.root)
    assert outcome.code == 0, outcome.errors
    assert len(losses(run_dir)) == 8 and all(math.isfinite(loss) for loss in losses(run_dir))
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["videos"] == 16 and summary["steps"] == 8
    assert (run_dir / "weights.safetensors").exists()
    assert {event["bad_clips"] for event in events(run_dir, "step")} == {0}
    if peak_flops(torch.cuda.get_device_name()) is not None:
        assert "MFU" in outcome.output, "the peak of this GPU is known"
    again = train(run_dir, *asked, data=motion_set.root)
    assert again.code == 0, again.errors


@pytest.mark.parametrize("decoder", ["pyav", "hybrid"])
def test_a_run_with_another_decoder_ends_well(motion_set: MotionSet, tmp_path: Path, decoder: str) -> None:
    asked = on_gpu(optimisation__steps=4, data__decoder=decoder, evaluation__at_end="false")
    outcome = train(tmp_path / "run", *asked, data=motion_set.root)
    assert outcome.code == 0, outcome.errors


def test_too_little_memory_is_said_in_words(motion_set: MotionSet, tmp_path: Path) -> None:
    large = {"resolution": 448, "width": 256, "depth": 6}
    overrides = {f"model__overrides.{name}": value for name, value in large.items()}
    outcome = train(
        tmp_path / "run",
        *on_gpu(engine__micro_batch=8, engine__zero_stage=1, engine__recomputed_blocks=0, **overrides),
        data=motion_set.root,
        script=Path(__file__).with_name("with_little_memory.py"),
        variables={"PYTHONPATH": str(ROOT)},
    )
    assert outcome.code == 2, outcome.errors
    assert "out of memory with 8 clips per rank" in outcome.errors
    assert "engine.micro_batch" in outcome.errors and "Traceback" not in outcome.errors


def typed(*command: str, folder: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False
    )


def test_nvdec_decodes_a_trial_clip(device: torch.device) -> None:
    result = typed("-m", "pipelines.trial_decode", str(device))
    assert (result.returncode, result.stdout.strip()) == (0, '{"frames": 16}'), result.stderr


def test_the_preflight_finds_this_gpu_sound(tmp_path: Path) -> None:
    result = typed("launch/doctor.py", "--folder", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "NVDEC" in result.stdout


def test_the_preflight_misses_gpus_that_are_not_there(tmp_path: Path) -> None:
    result = typed("launch/doctor.py", "--folder", str(tmp_path), "--gpus-per-node", "9")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "9" in result.stdout
