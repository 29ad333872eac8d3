"""The commands as a person types them."""

import json
import os
import subprocess
import sys
from pathlib import Path

from mlflow.tracking import MlflowClient

from tests.conftest import MotionSet
from tests.integration.processes import ROOT, SMALL


def typed(
    *command: str, folder: Path, variables: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command with the environment's programs on the path."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": path, **(variables or {})},
        capture_output=True,
        text=True,
        timeout=1200,
    )


def test_deepspeed_trains_and_mlflow_knows(motion_set: MotionSet, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/mlflow.db"
    result = typed(
        "deepspeed", "--num_gpus", "2", "launch/train.py",
        "--recipe", str(SMALL), "--run-dir", str(tmp_path / "run"),
        "--set", f"data.train={motion_set.train}", "--set", f"data.val={motion_set.val}",
        "--set", "tracking.enabled=true", "--set", "tracking.every_steps=5", "--set", "engine.zero_stage=2",
        folder=ROOT, variables={"MLFLOW_TRACKING_URI": store},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert f"mlflow ui --backend-store-uri {store}" in result.stdout
    client = MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name("uniformerv2").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["model.preset"] == "tiny"
    assert run.data.params["optimisation.learning_rate"] == "0.002"
    steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]
    assert sorted(steps) == [1, 5, 10, 15, 20]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert run.data.metrics["val/top1"] == summary["top1"]
    assert {"speed/clips_per_second", "speed/data_wait_share", "train/gradient_norm"} <= set(run.data.metrics)
    artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"recipe.yaml", "environment.json", "confusion.png", "summary.json"} <= artifacts


def test_check_says_what_a_run_would_do_and_what_is_missing(tmp_path: Path) -> None:
    result = typed("python", "launch/train.py", "--recipe", "recipes/k710_l14.yaml", "--check", folder=ROOT)
    assert result.returncode == 0, result.stderr
    for words in ("354,417,350", "665.6 GMACs", "512 clips a step", "data/k710/train.arrow", "a GPU"):
        assert words in result.stdout, words
