"""Continues a run directory that an earlier version of the program wrote.

`data/old_run.tar.xz` holds a run that two ranks trained for 7 of 10 steps with commit 61db9c1.
`data/old_run.json` holds how that commit finished it on one rank, and on which CPU.
"""

import hashlib
import json
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import MotionSet
from tests.integration.processes import events, settings, train

DATA = Path(__file__).parent / "data"
SETTINGS = settings(
    model__overrides__width=16,
    model__overrides__heads=1,
    model__overrides__global_heads=1,
    optimisation__steps=10,
    optimisation__ema_decay=0.9,
    engine__micro_batch=8,
    evaluation__clips=1,
    evaluation__crops=1,
    evaluation__batch=8,
    run__keep_last=1,
)


def digest(weights: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode() + weights[name].contiguous().numpy().tobytes())
    return found.hexdigest()


def test_a_run_directory_of_an_earlier_version_is_continued(motion_set: MotionSet, tmp_path: Path) -> None:
    """Bit for bit with the same CPU kernels and PyTorch; others round differently."""
    expected = json.loads((DATA / "old_run.json").read_text())
    with tarfile.open(DATA / "old_run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    run_dir = tmp_path / "old_run"
    outcome = train(run_dir, *SETTINGS, data=motion_set.root)
    assert outcome.code == 0, outcome.errors
    assert [event["step"] for event in events(run_dir, "start")] == [0, 7]
    steps = events(run_dir, "step")[7:]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["steps"] == 10 and summary["starts"] == 2
    losses, norms = [step["loss"] for step in steps], [step["gradient_norm"] for step in steps]
    same_rounding = (
        expected["cpu"] in Path("/proc/cpuinfo").read_text()
        and torch.backends.cpu.get_cpu_capability() == expected["capability"]
        and torch.__version__ == expected["torch"]
    )
    if same_rounding:
        assert [step["batch_hash"] for step in steps] == expected["batch_hashes"]
        assert losses == expected["step_losses"] and norms == expected["gradient_norms"]
        assert summary["loss"] == expected["validation_loss"]
        assert digest(load_file(run_dir / "weights.safetensors")) == expected["weights_sha256"]
    else:
        assert losses == pytest.approx(expected["step_losses"], abs=1e-4)
        assert norms == pytest.approx(expected["gradient_norms"], rel=1e-2)
        assert summary["loss"] == pytest.approx(expected["validation_loss"], abs=1e-3)
