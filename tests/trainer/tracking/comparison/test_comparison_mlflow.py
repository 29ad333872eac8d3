"""Runs in a real MLflow database, compared with the same runs' directories."""

import json
import shutil
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.tracking.comparison.run_folders import make_run, recipe
from trainer.errors import RunError, StartAgain
from trainer.tracking.comparison.command import RunReader, save_to_mlflow
from trainer.tracking.comparison.compare import compare
from trainer.tracking.comparison.folder_source import read_folder
from trainer.tracking.comparison.mlflow_source import MlflowSource
from trainer.tracking.comparison.report import report
from trainer.tracking.comparison.results import results_table
from trainer.tracking.mlflow_tracker import MlflowTracker, find_mlflow_run_id

PATIENCE = 120.0


def track(path: Path, uri: str, *, starts: int = 1, parent: str | None = None, **changes: Any) -> str:
    """Record a run directory in MLflow as `RunLogger` does; returns the run's id."""
    tracker = MlflowTracker(path, uri=uri, experiment="comparison", run_name=path.name, parent=parent)
    tracker.record_params(recipe(path, **changes).flattened())
    tracker.upload_artifact(path / "recipe.yaml")
    status = "KILLED"
    losses = []
    for event in map(json.loads, (path / "events.jsonl").read_text().splitlines()):
        if event["event"] == "start":
            known = {name: event[name] for name in event if name.endswith("fingerprint")}
            tracker.set_tags({**known, "starts": starts, "total_steps": event["total_steps"]})
        elif event["event"] == "step":
            losses.append(event["loss"])
            metrics = {
                "train/loss": event["loss"], "wall_clock/step": event["step"],
                "train/loss_mean": sum(losses) / len(losses),
                "videos/quarantined": event["quarantined"],
                "wall_clock/clips_per_second": event["clips_per_second"],
                "wall_clock/data_wait_share": event["data_wait_share"], "wall_clock/mfu": event["mfu"],
                "wall_clock/hours": event["spent"] / 3600,
                "wall_clock/gpu_hours": event["device_seconds"] / 3600,
            }  # fmt: skip
            tracker.record_metrics(event["step"], metrics)
        elif event["event"] == "evaluation":
            tracker.record_metrics(
                event["step"], {f"val/{name}": event[name] for name in ("top1", "top5", "loss")}
            )
        elif event["event"] == "end":
            numbers = {name: value for name, value in event.items() if isinstance(value, int | float)}
            tracker.record_metrics(
                event["steps"], {f"whole_run/{name}": value for name, value in numbers.items()}
            )
            status = "FINISHED"
    assert tracker.close(status, PATIENCE) == 0
    found = find_mlflow_run_id(path)
    assert found is not None
    return found


class Tracked:
    """uri: of a database with three runs of an experiment, and their parent run."""

    def __init__(self, folder: Path) -> None:
        self.uri = f"sqlite:///{folder}/mlflow.db"
        sweep = folder / "sweep"
        sweep.mkdir()
        tracker = MlflowTracker(sweep, uri=self.uri, experiment="comparison", run_name="sweep")
        tracker.record_params({"sweep": 3, "seed": "1, 2"})
        tracker.close("FINISHED", PATIENCE)
        self.parent = str(find_mlflow_run_id(sweep))
        changes = {"parent": self.parent, "tracking__parent_run": self.parent}
        own = {"tracking__parent_run": self.parent}
        self.folders = [
            make_run(folder / "one", seed=1, top1={2: 0.6, 4: 0.5}, **own),
            make_run(folder / "two", seed=2, top1={4: 0.55}, optimisation__learning_rate=1e-4, **own),
            make_run(folder / "left", losses=(4.0, 3.0), top1={2: 0.3}, end="left", seed=1, **own),
        ]
        self.ids = [
            track(self.folders[0], self.uri, seed=1, **changes),
            # Started again with another learning rate: its parameters are those of the first start.
            track(self.folders[1], self.uri, seed=2, optimisation__learning_rate=7.0, starts=2, **changes),
            track(self.folders[2], self.uri, seed=1, **changes),
        ]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    return Tracked(tmp_path_factory.mktemp("tracked"))


@pytest.fixture
def source(tracked: Tracked) -> Iterator[MlflowSource]:
    found = MlflowSource(tracked.uri)
    yield found
    found.close()


def test_mlflow_and_folders_give_the_same(tracked: Tracked, source: MlflowSource) -> None:
    stored = compare(source.search("comparison", ""))
    lying = compare([read_folder(path) for path in tracked.folders])
    assert [run.name for run in stored.runs] == ["one", "two", "left"]
    assert results_table(stored.runs) == results_table(lying.runs)
    assert stored.differences == lying.differences
    assert [difference.field for difference in stored.differences] == ["seed", "optimisation.learning_rate"]
    assert (stored.groups, stored.data) == (lying.groups, lying.data)
    for one, other in zip(stored.runs, lying.runs, strict=True):
        assert one.recipe == other.recipe and one.data == other.data and one.parent == other.parent
        assert one.results == pytest.approx(other.results)
        for found in (one, other):  # MLflow is asked for the loss of the last one alone
            found.evaluations[:-1] = [replace(each, loss=None) for each in found.evaluations[:-1]]
        assert one.evaluations == other.evaluations
        curves = one.read_curve(), other.read_curve()
        assert curves[0] is not None and curves[1] is not None
        assert curves[0].gpu_hours == pytest.approx(curves[1].gpu_hours)
        assert curves[0].loss.tolist() == curves[1].loss.tolist()


def test_runs_are_found_by_filter_by_id_and_with_folders(tracked: Tracked, source: MlflowSource) -> None:
    assert [run.name for run in source.search(None, "metrics.`val/top1` > 0.52")] == ["two"]
    gathering = RunReader(
        [tracked.ids[2], str(tracked.folders[0])], "comparison", None, tracked.uri, tracked.ids[0]
    )
    found, baseline = gathering.read(lambda done, total: None)
    gathering.close()
    assert sorted(run.name for run in found) == ["left", "one", "one", "two"]  # a folder and its MLflow run
    assert baseline == tracked.ids[0]


def test_mistakes_have_messages(tracked: Tracked, source: MlflowSource, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="did you mean 'comparison'"):
        source.search("comparisson", "")
    with pytest.raises(RunError, match="metrics"):
        source.search("comparison", "metrics.val/top1 >")
    with pytest.raises(RunError, match="0" * 32):
        source.runs(["0" * 32])
    with pytest.raises(RunError, match="nowhere"):
        MlflowSource(f"sqlite:///{tmp_path}/nowhere.db")
    assert not (tmp_path / "nowhere.db").exists()
    with pytest.raises(RunError, match="--uri"):
        MlflowSource("sqlight:///x.db")


def test_a_server_that_does_not_answer_is_to_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(StartAgain, match=str(port)):
        MlflowSource(f"http://127.0.0.1:{port}").search("comparison", "")


def test_the_report_is_saved_in_the_parent_run(
    tracked: Tracked, source: MlflowSource, tmp_path: Path
) -> None:
    comparison = compare(source.search("comparison", ""))
    assert (
        save_to_mlflow(comparison, report(comparison, curves=True), "parent", lambda: source)
        == tracked.parent
    )
    saved = Path(source._client.download_artifacts(tracked.parent, "comparison", str(tmp_path)))
    names = {"comparison.html", "comparison.md", "comparison.curves.png", "comparison.json"}
    assert {path.name for path in saved.iterdir()} == names
    assert len(json.loads((saved / "comparison.json").read_text())["runs"]) == 3
    alone = shutil.copytree(tracked.folders[0], tmp_path / "alone")
    make_run(tmp_path / "without")
    comparison = compare([read_folder(alone), read_folder(tmp_path / "without")])
    with pytest.raises(RunError, match="--log-to parent"):
        save_to_mlflow(comparison, [], "parent", lambda: source)


def test_missing_values_in_mlflow_are_no_error(tracked: Tracked, source: MlflowSource) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracked.uri)
    experiment = client.create_experiment("bare")
    bare = client.create_run(experiment, run_name="bare")
    odd = client.create_run(experiment, run_name="odd", tags={"total_steps": "many"})
    client.log_metric(odd.info.run_id, "val/top1", float("nan"))
    client.log_metric(odd.info.run_id, "train/loss", float("nan"), step=3)
    found = compare(source.search("bare", ""))
    assert {run.name: run.status for run in found.runs} == {"bare": "running", "odd": "running"}
    assert all("recipe.yaml" in run.notes[0] for run in found.runs)
    report(found, curves=True)
    assert bare.info.run_id in {run.source for run in found.runs}
