"""That the host waits nowhere for the GPU in a training step."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import MotionSet
from tests.gpu.counted_waits import waits
from tests.gpu.test_run import on_gpu
from tests.integration.processes import python_path
from tests.integration.processes import train as run_training
from tests.trainer.checkpoint.training import RATE, make_engine, train
from tests.trainer.ranks import Ranks

pytestmark = pytest.mark.gpu

WARM = 4  # steps after which everything that a run makes once is there


def waits_of_a_step(stage: int, precision: str) -> dict[str, list[str]]:
    engine = make_engine(stage, precision=precision)
    train(engine, 0, 2)
    clips = torch.randn(4, 3, 4, 16, 16, device=engine.device)
    keys = torch.arange(4, device=engine.device)
    torch.cuda.synchronize()
    found: dict[str, list[str]] = {}
    for part in ("first", "last"):
        forward, backward, step = (
            found.setdefault(f"{part} {name}", []) for name in ("forward", "backward", "step")
        )
        loss = waits(lambda: F.cross_entropy(engine.forward(clips, keys), keys), forward)
        waits(lambda loss=loss: engine.backward(loss), backward)
        waits(lambda: engine.step(RATE), step)
    return found


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "bf16")])
def test_the_engine_does_not_wait(rank: Ranks, stage: int, precision: str) -> None:
    (found,) = rank.run(waits_of_a_step, stage, precision)
    assert {name: places for name, places in found.items() if places} == {}


def test_a_step_of_a_run_does_not_wait(motion_set: MotionSet, tmp_path: Path) -> None:
    """Data, copies to the device, losses and totals included; events of earlier work are not counted."""
    outcome = run_training(
        tmp_path / "run",
        *on_gpu(optimisation__steps=12, evaluation__at_end="false"),
        data=motion_set.root,
        script=Path(__file__).with_name("counted_waits.py"),
        variables={**python_path(), "WAITS": str(tmp_path / "waits")},
    )
    assert outcome.code == 0, outcome.errors
    steps = json.loads((tmp_path / "waits").read_text())[WARM:]
    assert len(steps) > WARM
    assert Counter(place for step in steps for place in step) == {}
