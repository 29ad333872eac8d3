"""Whole runs on a GPU."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import MotionSet
from tests.integration.processes import events, losses, settings, train
from trainer.monitoring.throughput import peak_flops

pytestmark = pytest.mark.gpu


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
        assert "MFU" in outcome.output + outcome.errors, "the peak of this GPU is known"
    again = train(run_dir, *asked, data=motion_set.root)
    assert again.code == 0, again.errors


@pytest.mark.parametrize("decoder", ["pyav", "hybrid"])
def test_a_run_with_another_decoder_ends_well(motion_set: MotionSet, tmp_path: Path, decoder: str) -> None:
    asked = on_gpu(optimisation__steps=4, data__decoder=decoder, evaluation__at_end="false")
    outcome = train(tmp_path / "run", *asked, data=motion_set.root)
    assert outcome.code == 0, outcome.errors
