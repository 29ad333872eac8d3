"""launch/compare.py on a real run and its MLflow run, on copies of it, and on made run directories."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch import compare
from tests.conftest import MotionSet
from tests.integration.processes import ROOT, settings, train
from tests.trainer.tracking.comparison.run_folders import make_run, write_scores
from trainer.tracking.comparison.differences import SAME
from trainer.tracking.mlflow_tracker import find_mlflow_run_id

Run = Callable[..., tuple[int, str, str]]


@dataclass(frozen=True)
class Trained:
    """folder: of a run of four steps, which was evaluated twice. uri: where MLflow has it, under `run_id`."""

    folder: Path
    uri: str
    run_id: str


@pytest.fixture(scope="module")
def trained(motion_set: MotionSet, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("compare")
    uri = f"sqlite:///{root}/mlflow.db"
    changes = settings(
        optimisation__steps=4, optimisation__warmup_steps=1, evaluation__every_steps=2, evaluation__clips=1,
        evaluation__crops=1, evaluation__batch=8, tracking__enabled="true", tracking__uri=uri,
        tracking__every_steps=3, tracking__experiment="compared",
    )  # fmt: skip
    outcome = train(root / "trained", *changes, data=motion_set.root)
    assert outcome.code == 0, outcome.errors
    run_id = find_mlflow_run_id(root / "trained")
    assert run_id is not None
    return Trained(root / "trained", uri, run_id)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit code, output and errors of the command."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
        code = compare.main()
        return code, *capsys.readouterr()

    return call


def test_a_run_is_the_same_from_its_folder_and_from_mlflow(trained: Trained, run: Run) -> None:
    code, folder, _ = run(trained.folder, "--json")
    assert code == 0
    code, stored, _ = run(trained.run_id, "--uri", trained.uri, "--json")
    assert code == 0
    (one,), (other,) = json.loads(folder)["runs"], json.loads(stored)["runs"]
    for name in ("name", "status", "recipe", "data"):
        assert one[name] == other[name], name
    assert one["results"] == pytest.approx(other["results"], abs=1e-6)
    summary = json.loads((trained.folder / "summary.json").read_text())
    results = one["results"]
    assert results["top1"] == summary["top1"] and results["step"] == results["total_steps"] == 4
    assert 0 < results["gpu_hours"] == pytest.approx(results["hours"])  # one rank
    assert results["clips_per_second"] == summary["clips_per_second"] and results["quarantined"] == 0
    assert results["mfu"] is None  # of a CPU nobody knows the peak
    assert len(one["data"]["train_fingerprint"]) == len(one["data"]["val_fingerprint"]) == 64
    code, table, _ = run(trained.folder)
    assert code == 0 and "trained" in table
    code, stored, errors = run("--experiment", "compared", "--uri", trained.uri)
    assert code == 0 and stored == table, errors


def test_a_copy_had_the_same_batches_and_another_seed_had_not(
    trained: Trained, run: Run, tmp_path: Path
) -> None:
    copy, other = tmp_path / "copy", tmp_path / "other"
    shutil.copytree(trained.folder, copy)
    shutil.copytree(trained.folder, other)
    recipe = (other / "recipe.yaml").read_text()
    (other / "recipe.yaml").write_text(recipe.replace("seed: 7", "seed: 8", 1))
    events = (other / "events.jsonl").read_text().splitlines()
    third = next(place for place, line in enumerate(events) if '"step": 3,' in line)
    events[third] = json.dumps({**json.loads(events[third]), "batch_hash": "f" * 16})
    (other / "events.jsonl").write_text("\n".join(events) + "\n")
    code, output, errors = run(trained.folder, copy, other, "--baseline", trained.folder, "--json")
    assert code == 0, errors
    found = json.loads(output)
    said = {one["name"]: one["data_against_baseline"] for one in found["runs"]}
    assert said["copy"] == f"{SAME}; the batch hashes of all 4 steps that both recorded are the same"
    assert said["other"].startswith("same manifests, other batches: seed (7 / 8)")
    assert "first differ at step 3, and in 1 of 4" in said["other"]
    assert [len(group["runs"]) for group in found["groups"]] == [3]
    assert list(found["differences"]) == ["seed"]


def test_reports_are_written_and_saved_in_mlflow(trained: Trained, run: Run, tmp_path: Path) -> None:
    made = make_run(tmp_path / "made", top1={4: 0.9})
    write_scores(made / "scores.parquet", labels=[0, 1], predictions=[0, 1])
    page, text = tmp_path / "report.html", tmp_path / "report.md"
    assert run(trained.folder, made, "--out", page)[0] == 0
    assert "data:image/png" in page.read_text() and "made" in page.read_text()
    code, output, errors = run(
        trained.run_id, made, "--out", text, "--uri", trained.uri, "--log-to", trained.run_id
    )
    assert code == 0, errors
    assert "![curves](report.curves.png)" in text.read_text()
    assert (tmp_path / "report.curves.png").stat().st_size > 10_000
    assert "made" in output and trained.run_id in errors
    from mlflow.tracking import MlflowClient

    saved = {file.path for file in MlflowClient(trained.uri).list_artifacts(trained.run_id, "comparison")}
    assert "comparison/comparison.html" in saved and "comparison/comparison.json" in saved


def test_mistakes_end_with_2_and_a_line(run: Run, tmp_path: Path) -> None:
    made = make_run(tmp_path / "made")
    make_run(tmp_path / "more")
    (tmp_path / "empty").mkdir()
    for arguments, said in (
        ((), "--experiment"),
        ((tmp_path / "nowhere",), "nowhere"),
        ((tmp_path / "empty",), "empty"),
        ((made, "--out", tmp_path / "report.pdf"), ".html"),
        ((made, "--out", tmp_path / "no" / "report.html"), str(tmp_path / "no")),
        ((made, "--baseline", tmp_path), "--baseline"),
        ((made, "--baseline", "typo"), "typo"),
        (("0" * 32, "--uri", f"sqlite:///{tmp_path}/none.db"), "none.db"),
        ((made, "--log-to", "parent"), "parent"),
    ):
        code, output, errors = run(*arguments)
        assert code == 2 and errors.count("error: ") == 1 and said in errors, (arguments, errors)
        assert "Traceback" not in errors and (output == "" or "--log-to" in arguments)
    assert not (tmp_path / "none.db").exists()


def test_a_damaged_run_does_not_stop_the_others(run: Run, tmp_path: Path) -> None:
    make_run(tmp_path / "good", top1={4: 0.5})
    bad = make_run(tmp_path / "bad", top1={4: 0.4})
    (bad / "recipe.yaml").write_bytes(b"\xff" * 100)
    (bad / "events.jsonl").write_bytes(b"\x00" * 2**20)
    code, output, errors = run(tmp_path)
    assert code == 0 and "good" in output and "recipe.yaml" in output, errors


def test_ctrl_c_ends_with_130(tmp_path: Path) -> None:
    for number in range(200):
        make_run(tmp_path / str(number))
    command = [sys.executable, "-u", "launch/compare.py", str(tmp_path)]
    # A shell that starts the tests in the background has SIGINT ignored, by them and all they start.
    slow = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    slow += "import time, trainer.tracking.comparison.command as command\n"
    slow += "command.read_folder = lambda path: (print('reading', flush=True), time.sleep(60))\n"
    slow += (
        f"import sys, runpy; sys.argv = {command[2:]!r}; runpy.run_path({command[2]!r}, run_name='__main__')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "reading\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors, errors
