"""Which runs have ended, and how their evaluations are told apart."""

import json
from pathlib import Path

import pytest

from tests.trainer.checkpoint.test_weights_origin import STATE
from trainer.checkpoint.metadata import TrainState
from trainer.config.load import load_recipe
from trainer.config.schema import Recipe
from trainer.evaluation.finished_run import changed_settings, choose_reevaluation, is_finished
from trainer.monitoring.run_dir import RunDir

SMALL = Path(__file__).parents[2] / "integration" / "small.yaml"


def trained(**other: object) -> TrainState:
    recipe = json.loads(load_recipe(SMALL).model_dump_json())
    return TrainState(**{**vars(STATE), "step": 20, "description": {"recipe": {**recipe, **other}}})


def now(*overrides: str) -> Recipe:
    return load_recipe(SMALL, overrides)


def test_a_run_has_ended_when_the_results_of_its_last_step_are_written(tmp_path: Path) -> None:
    folder, found = RunDir(tmp_path), tmp_path / "checkpoints" / "step-0000020"
    assert not is_finished(folder, found, trained(), 20)
    folder.weights.touch()
    folder.summary.write_text('{"steps": 10}')  # it was lengthened since
    assert not is_finished(folder, found, trained(), 20)
    folder.summary.write_text('{"steps": 20}')
    assert is_finished(folder, found, trained(), 20)
    assert not is_finished(folder, found, trained(), 30)
    assert not is_finished(RunDir(tmp_path / "branch"), found, trained(), 20)


@pytest.mark.parametrize(
    ("overrides", "metrics"),
    [
        ((), "val/"),
        (("evaluation.batch=1",), "val/"),
        (("evaluation.clips=4",), "val_4x3/"),
        (("data.val=other/val.arrow",), "manifest_other_val_2x3/"),
        (("data.val=other/my set.arrow",), "manifest_other_my_set_2x3/"),
    ],
)
def test_what_measures_something_else_has_metrics_of_its_own(
    overrides: tuple[str, ...], metrics: str
) -> None:
    assert choose_reevaluation(now(*overrides), trained()).metrics == metrics


def test_changed_settings_are_named_and_what_another_version_wrote_is_passed_over() -> None:
    changed = changed_settings(now("evaluation.clips=4", "seed=3"), trained(unknown=1))
    assert changed == {"evaluation.clips": [2, 4], "seed": [7, 3]}
    assert changed_settings(now(), STATE) == {}
