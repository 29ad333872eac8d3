"""The records of a finished run that is started again, and of a training from another run's weights."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.tracking import MlflowClient
from safetensors import safe_open

from pipelines.dataset.manifest import Manifest, write_manifest
from tests.conftest import MotionSet
from tests.integration.processes import ROOT, events, losses, settings, train

SHORT = settings(
    optimisation__steps=3, optimisation__warmup_steps=1, evaluation__crops=1, evaluation__clips=1
)


def tracked(folder: Path) -> list[str]:
    return [*SHORT, *settings(tracking__enabled="true", tracking__uri=f"sqlite:///{folder}/mlflow.db")]


def recorded(run_dir: Path) -> dict[str, str]:
    """Digests of the run's files, without those that every start writes to."""
    passing = ("mlflow", "lock", "events.jsonl")
    files = [path for path in sorted(run_dir.rglob("*")) if path.is_file()]
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if not (name := str(path.relative_to(run_dir))).startswith(passing)
    }


def run_in(folder: Path) -> Any:
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    runs = client.search_runs([found.experiment_id for found in client.search_experiments()])
    return runs[0] if len(runs) == 1 else sorted(runs, key=lambda run: run.info.start_time)


@pytest.fixture(scope="module")
def finished(motion_set: MotionSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("again") / "run"
    outcome = train(run_dir, *tracked(run_dir.parent), data=motion_set.root)
    assert outcome.code == 0, outcome.errors
    return run_dir


@pytest.mark.soak
def test_another_evaluation_of_a_finished_run_is_recorded_separately(
    finished: Path, motion_set: MotionSet
) -> None:
    before, run = recorded(finished), run_in(finished.parent)
    again = train(finished, *tracked(finished.parent), *settings(evaluation__clips=2), data=motion_set.root)
    assert again.code == 0, again.errors
    assert recorded(finished) == before
    assert json.loads((finished / "summary.json").read_text())["starts"] == 1
    assert len(events(finished, "start")) == len(events(finished, "end")) == 1
    (event,) = events(finished, "re-evaluation")
    assert event["step"] == 3 and event["changed"] == {"evaluation.clips": [1, 2]}
    after = run_in(finished.parent)
    assert after.info.status == "FINISHED" and after.data.params == run.data.params
    assert after.data.metrics["val_2x1/top1"] == event["top1"]
    assert after.data.metrics["val/top1"] == run.data.metrics["val/top1"]


@pytest.mark.soak
def test_other_weights_are_refused_or_with_allow_change_leave_the_records(
    finished: Path, motion_set: MotionSet
) -> None:
    before = recorded(finished)
    other = settings(model__weights="never_used.safetensors")
    refused = train(finished, *tracked(finished.parent), *other, data=motion_set.root)
    assert refused.code == 2 and "model.weights: null then, never_used" in refused.errors
    allowed = train(
        finished, *tracked(finished.parent), *other, "--allow-change", "model.weights", data=motion_set.root
    )
    assert allowed.code == 0, allowed.errors
    assert recorded(finished) == before
    assert len(events(finished, "start")) == 1


@pytest.mark.soak
def test_a_start_without_checkpoint_and_with_other_settings_is_a_new_mlflow_run(
    motion_set: MotionSet, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    wild = settings(
        optimisation__learning_rate=1,
        optimisation__warmup_steps=0,
        optimisation__clip_norm="null",
        optimisation__skipped_steps=0,
    )
    first = train(
        run_dir,
        *tracked(tmp_path),
        *wild,
        data=motion_set.root,
        script=Path(__file__).with_name("wild_rate.py"),
        variables={"PYTHONPATH": str(ROOT)},
    )
    assert first.code == 2 and not list((run_dir / "checkpoints").glob("step-*")), first.errors
    second = train(run_dir, *tracked(tmp_path), data=motion_set.root)
    assert second.code == 0, second.errors
    diverged, trained = run_in(tmp_path)
    assert trained.data.params["optimisation.learning_rate"] == "0.002"
    assert diverged.data.params["optimisation.learning_rate"] == "1.0"
    assert trained.info.status == "FINISHED" and diverged.info.status == "FAILED"


@pytest.mark.soak
def test_fine_tuning_starts_from_the_head_rows_of_its_classes(
    finished: Path, motion_set: MotionSet, tmp_path: Path
) -> None:
    data, names = part_of(motion_set, tmp_path, (5, 2))
    weights = finished / "weights.safetensors"
    run_dir = tmp_path / "run"
    tuned = train(run_dir, *SHORT, *settings(model__weights=weights, optimisation__steps=1), data=data)
    assert tuned.code == 0, tuned.errors
    assert "2 of 2 rows copied by class name, of the file's 8" in tuned.output
    with safe_open(run_dir / "weights.safetensors", "pt") as file:
        recipe = json.loads(file.metadata()["recipe"])
    assert recipe["model"]["weights"] == str(weights)
    assert yaml.safe_load((run_dir / "recipe.yaml").read_text())["model"]["weights"] == str(weights)
    state = json.loads((run_dir / "checkpoints/step-0000001/state.json").read_text())
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert state["settled"]["model.weights"] == {"file": str(weights), "sha256": digest}
    events = map(json.loads, (run_dir / "events.jsonl").read_text().splitlines())
    (event,) = [event for event in events if event["event"] == "starting weights"]
    assert "head.weight" in event["loaded"] and not event["new"] and event["file"] == str(weights)
    assert len(losses(run_dir)) == 1 and names == ("turn_counterclockwise", "move_up")


def part_of(motion_set: MotionSet, folder: Path, labels: tuple[int, ...]) -> tuple[Path, tuple[str, ...]]:
    """Manifests with the videos of some classes, in this order."""
    for name in ("train", "val"):
        whole = Manifest.open(motion_set.root / f"{name}.arrow")
        names = tuple(whole.class_names[label] for label in labels)
        rows = [
            dataclasses.replace(row, path=str(motion_set.root / row.path), label=labels.index(row.label))
            for row in map(whole.row, range(len(whole)))
            if row.label in labels
        ]
        write_manifest(folder / f"{name}.arrow", rows, names)
    return folder, names
