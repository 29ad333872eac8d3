"""The quickstart as a person runs it, and what it must reach. Minutes, so only in `make soak`."""

import json
from pathlib import Path

import pytest

from tests.integration.processes import ROOT, typed

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the embedded data set is rendered, by the first of the two runs."""
    return tmp_path_factory.mktemp("motion")


def result(recipe: str, data: Path, run_dir: Path) -> dict[str, float]:
    command = [
        "deepspeed",
        "launch/train.py",
        "--recipe",
        f"recipes/{recipe}.yaml",
        "--run-dir",
        str(run_dir),
    ]
    for name in ("train", "val"):
        command += ["--set", f"data.{name}={data / name}.arrow"]
    done = typed(
        *command, folder=ROOT, variables={"MLFLOW_TRACKING_URI": f"sqlite:///{run_dir.parent}/mlflow.db"}
    )
    assert done.returncode == 0, done.stderr
    summary: dict[str, float] = json.loads((run_dir / "summary.json").read_text())
    return summary


def test_the_model_learns_time(data: Path, tmp_path: Path) -> None:
    summary = result("quickstart", data, tmp_path / "run")
    assert summary["videos"] >= 400
    assert summary["top1"] >= 0.9


def test_without_time_it_cannot(data: Path, tmp_path: Path) -> None:
    """The classes are pairs that only the order of frames tells apart: half is the most there is to have."""
    summary = result("quickstart_order_blind", data, tmp_path / "run")
    assert summary["videos"] >= 400
    assert 0.2 <= summary["top1"] <= 0.55  # it does learn what can be seen: one of eight is chance
