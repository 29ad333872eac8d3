"""How the parts of a run are wired."""

from pathlib import Path

import pytest

from tests.trainer.ranks import Ranks
from trainer import RunError
from trainer.environment import find_environment
from trainer.recipe.file import load_recipe
from trainer.run import LEAVING_TAKES, Run
from trainer.run_folder import RunFolder

SMALL = Path(__file__).parents[1] / "integration" / "small.yaml"


def longest_and_margin(run_dir: Path) -> tuple[float, float]:
    """Of a run that goes on: seconds that a save may take, and those at which it asks to leave."""
    recipe = load_recipe(SMALL)
    run = Run(recipe, RunFolder(run_dir), find_environment("cpu"))
    run._create_folder(None, 0)
    return run.checkpoints.longest, run._stop_request()._margin()


def test_a_new_start_leaves_time_for_what_saves_took_before(tmp_path: Path) -> None:
    RunFolder(tmp_path).event("checkpoint", step=3, path="x", seconds=100.0)
    with Ranks(1) as ranks:
        ((longest, margin),) = ranks.run(longest_and_margin, tmp_path)
    assert longest == 100
    assert margin == LEAVING_TAKES + 300


def refused_folder(run_dir: Path) -> str:
    run = Run(load_recipe(SMALL), RunFolder(run_dir), find_environment("cpu"))
    with pytest.raises(RunError) as refusal:
        run._create_folder(None, 0)
    return str(refusal.value)


def test_a_folder_that_cannot_be_tidied_is_refused_in_words(tmp_path: Path) -> None:
    in_the_way = tmp_path / "checkpoints" / ".step-0000003.partial"
    in_the_way.parent.mkdir()
    in_the_way.touch()  # no folder: it cannot be removed as one
    with Ranks(1) as ranks:
        (said,) = ranks.run(refused_folder, tmp_path)
    assert str(tmp_path) in said and in_the_way.name in said and "Not a directory" in said
