"""The plans of `bench.py budget` beside the plan that `--check` chooses."""

import re
from pathlib import Path

import pytest

from trainer.benchmark.budget import Budget
from trainer.config.load import load_recipe
from trainer.config.recipe_names import find_recipe
from trainer.dry_run import ASSUMED_GPU, check
from trainer.engine.memory_estimate import AvailableMemory
from trainer.engine.step_kernels import Device
from trainer.errors import RunError
from trainer.monitoring.run_dir import RunDir
from trainer.setup.preparation import model_config


@pytest.mark.parametrize(("ranks", "compiled"), [(8, "true"), (64, "false")])
def test_check_of_the_headline_recipe_names_the_fastest_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ranks: int, compiled: str
) -> None:
    changes = [f"engine.compile={compiled}", "tracking.enabled=false"]
    recipe = load_recipe(find_recipe(Path("k400_l14_336_64f")), changes)
    with pytest.raises(RunError, match="no manifest"):
        check(recipe, RunDir(tmp_path), ranks)
    printed = " ".join(capsys.readouterr().out.split())
    budget = Budget(recipe, model_config(recipe, 400), Device(), ranks)
    first, second, *_ = budget.plans(AvailableMemory("cuda", ASSUMED_GPU))
    assert first.seconds / first.micro_batch < second.seconds / second.micro_batch
    named = re.search(
        r"micro-batch (\d+), (\d+) of 24 blocks recomputed, ZeRO 1: ([\d.]+) ms a clip on paper", printed
    )
    assert named is not None
    assert (int(named[1]), int(named[2])) == (first.micro_batch, first.recomputed)
    assert named[3] == f"{1000 * first.seconds / first.micro_batch:.1f}"
    assert f"{ranks} ranks x {first.micro_batch} clips x " in printed
