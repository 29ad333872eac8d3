"""Ablations: their files, what is trained and what is skipped, and the table."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.ablate import main, parse
from tests.conftest import MotionSet
from tests.integration.processes import ROOT, SMALL, python_path
from tests.trainer.tracking.comparison.run_folders import make_run
from trainer.errors import RecipeError
from trainer.paper.ablation import Ablation, load_ablation
from trainer.paper.results import order_agreement, read_results, report, save_results
from trainer.paper.runner import train_all, unfinished
from trainer.tracking.comparison.render import Table
from trainer.tracking.mlflow_tracker import find_mlflow_run_id

GRID = f"""\
name: grid
title: A grid
columns:
  - {{name: K400, recipe: {SMALL}, set: [optimisation.steps=4]}}
  - {{name: SSV2, recipe: {SMALL}}}
rows:
  - name: none
    set: [model.overrides.local_mhra=0]
    paper: {{K400: 83.1, SSV2: 45.1}}
  - name: two MHRA
    set: [model.overrides.local_mhra=2]
    paper: {{SSV2: 67.7}}
  - name: also two
    set: [model.overrides.local_mhra=2]
    paper: {{SSV2: 67.9}}
    note: the same again.
  - name: one MHRA
    only: {{SSV2: [model.overrides.local_mhra=1]}}
    paper: {{K400: 84.4, SSV2: 60.0}}
"""


def written(folder: Path, text: str = GRID) -> Path:
    path = folder / "grid.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def grid(tmp_path: Path) -> Ablation:
    return load_ablation(written(tmp_path))


def test_a_cell_is_its_column_and_row_and_equal_recipes_are_trained_once(grid: Ablation) -> None:
    assert [(c.row, c.column, c.paper) for c in grid.cells] == [
        ("none", "K400", 83.1), ("none", "SSV2", 45.1),
        ("two MHRA", "SSV2", 67.7), ("also two", "SSV2", 67.9),
        ("one MHRA", "K400", 84.4), ("one MHRA", "SSV2", 60.0),
    ]  # fmt: skip
    assert [c.variant.recipe.optimisation.steps for c in grid.cells] == [4, 20, 20, 20, 4, 20]
    local = [c.variant.recipe.model.overrides.get("local_mhra") for c in grid.cells]
    assert local == [0, 0, 2, 2, None, 1]
    runs = grid.runs(2, Path("home"))
    assert [stage.name for _, _, stage in runs[:5]] == [
        "grid-none-k400-seed0", "grid-none-ssv2-seed0", "grid-two-mhra-ssv2-seed0",
        "grid-one-mhra-k400-seed0", "grid-one-mhra-ssv2-seed0",
    ]  # fmt: skip
    assert [stage.variant.recipe.seed for _, _, stage in runs] == [7] * 5 + [8] * 5
    assert runs[0][2].run_dir == Path("home/grid-none-k400-seed0")
    assert len({stage.run_dir for _, _, stage in runs}) == 10


def test_rows_are_selected_and_overrides_come_last(tmp_path: Path) -> None:
    found = load_ablation(written(tmp_path), ["model.overrides.local_mhra=2"], "^one|^none")
    assert found.rows == ("none", "one MHRA")
    assert {cell.variant.recipe.model.overrides["local_mhra"] for cell in found.cells} == {2}
    with pytest.raises(RecipeError, match="no row matches --rows three"):
        load_ablation(written(tmp_path), (), "three")
    without = GRID.replace("paper: {SSV2: 67.7}", "paper: {}")
    with pytest.raises(RecipeError, match="no row that matches --rows two M has a number"):
        load_ablation(written(tmp_path, without), only="two M")
    with pytest.raises(RecipeError, match=r"--rows \("):
        load_ablation(written(tmp_path), (), "(")


def test_rows_of_another_ablation_have_its_numbers(tmp_path: Path) -> None:
    written(tmp_path)
    other = tmp_path / "other.yaml"
    column = f"columns: [{{name: motion, recipe: {SMALL}, paper: SSV2}}]"
    other.write_text(f"name: other\ntitle: Other\nrows_of: grid.yaml\n{column}\n")
    found = load_ablation(other)
    assert [cell.paper for cell in found.cells] == [45.1, 67.7, 67.9, 60.0]
    # What the row sets for the paper's column alone is set here too.
    assert found.cells[-1].variant.recipe.model.overrides["local_mhra"] == 1
    other.write_text(f"name: other\ntitle: Other\nrows_of: grid.yaml\n{column}\nrows: [{{name: a}}]\n")
    with pytest.raises(RecipeError, match="give `rows`, or `rows_of`"):
        load_ablation(other)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("local_mhra=0", "local_mhra=7", "row none, column K400: .*local_mhra is 7"),
        ("local_mhra=0", "local_mhro=0", "row none, column K400: .*local_mhro"),
        ("only: {SSV2:", "only: {SSV3:", "row one MHRA: only.SSV3: the row has no number for it"),
        ("name: also two", "name: two-MHRA", "two rows are named two-mhra"),
        ("paper: {SSV2: 67.7}", "paper: {SSV2: 677}", r"grid\.yaml:12: rows\.1\.paper\.SSV2"),
        ("paper: {SSV2: 67.7}", "paper: {SSV4: 67.7}", "two MHRA: paper.SSV4: there is no such column"),
        ("name: K400, recipe", "name: K401, recipe", "column K401: no row has a number for it"),
        ("title:", "titel:", r"grid\.yaml:2: titel: no such field"),
        ("title: A grid", "", r"grid\.yaml:1: title: missing"),
        (GRID, "", r"grid\.yaml: it is empty; an ablation is a mapping of"),
        (GRID, "name: grid\ntitle: x\ncolumns: 3\n", r"grid\.yaml:3: columns: a list is needed"),
        (str(SMALL), "smal", "column K400: there is no recipe named smal"),
    ],
)
def test_a_mistake_is_named_with_its_row_or_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_ablation(written(tmp_path, GRID.replace(old, new, 1)))


def test_an_unknown_ablation_lists_those_that_exist(grid: Ablation) -> None:
    with pytest.raises(
        RecipeError, match=r"no ablation table9z; did you mean table9.\? There are: .*table9b, .*table9d"
    ):
        load_ablation(Path("table9z"))
    for seeds in (0, 101):
        with pytest.raises(RecipeError, match=f"--seeds {seeds}: from 1 to 100"):
            grid.runs(seeds, Path("home"))


TOP1 = {  # of two seeds, by run
    "grid-none-k400": (0.2, 0.2),
    "grid-none-ssv2": (0.5, 0.7),
    "grid-two-mhra-ssv2": (0.8, 0.9),
    "grid-one-mhra-ssv2": (0.4, 0.4),
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "runs"
    for label, values in TOP1.items():
        for seed, value in enumerate(values):
            make_run(home / f"{label}-seed{seed}", top1={4: value}, seed=seed)
    return home


def test_the_table_has_mean_and_deviation_beside_the_paper(grid: Ablation, home: Path) -> None:
    make_run(home / "grid-one-mhra-k400-seed1", losses=(4.0, 3.0), top1={2: 0.3}, end="left")
    blocks = save_results(grid, 2, home)
    (table,) = [block for block in blocks if isinstance(block, Table)]
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}
    assert rows["none"] == ["83.1", "20.00 ± 0.00", "2", "45.1", "60.00 ± 14.14", "2"]
    assert rows["two MHRA"] == ["-", "-", "-", "67.7", "85.00 ± 7.07", "2"]
    assert rows["also two"] == ["-", "-", "-", "67.9", "85.00 ± 7.07", "2"]
    assert rows["one MHRA"] == ["84.4", "not started, stopped", "0 of 2", "60.0", "40.00 ± 0.00", "2"]
    assert "45.1 | 60.00 ± 14.14" in (home / "table.md").read_text()
    values = json.loads((home / "table.json").read_text())
    assert values[0]["top1"] == [0.2, 0.2] and values[4]["unfinished"] == ["not started", "stopped"]


def test_a_single_seed_has_no_deviation(grid: Ablation, home: Path) -> None:
    (table,) = [b for b in report(grid, read_results(grid, 1, home)) if isinstance(b, Table)]
    assert [cell.text for cell in table.rows[0]] == ["none", "83.1", "20.00", "1", "45.1", "50.00", "1"]


def test_the_order_is_compared_pair_by_pair(grid: Ablation, home: Path) -> None:
    """In the paper none < one < two; here one < none < two. Two rows of one training are one."""
    order = order_agreement(read_results(grid, 2, home), "SSV2")
    assert (order.same, order.pairs) == (2, 3)
    ((better, worse, paper, ours),) = order.reversed
    assert (better, worse) == ("one MHRA", "none")
    assert (round(paper, 1), round(ours, 1)) == (14.9, -20.0)
    assert order_agreement(read_results(grid, 2, home), "K400").pairs == 0


def leaving(codes: dict[str, int]) -> tuple[list[str], object]:
    """A command for `train_all` that notes the run, and ends with its exit code."""
    started: list[str] = []

    def command(arguments: list[str]) -> list[str]:
        name = Path(arguments[arguments.index("--run-dir") + 1]).name
        started.append(name)
        return [sys.executable, "-c", f"print('{name}'); exit({codes.get(name, 0)})"]

    return started, command


def test_a_table_does_not_mix_views(tmp_path: Path, monkeypatch, capsys) -> None:
    """A finished training keeps the views it was evaluated with; others may differ in what is free."""
    home = tmp_path / "runs"
    for _, _, stage in load_ablation(written(tmp_path)).runs(1, home):
        path = make_run(stage.run_dir, top1={4: 0.5})
        (path / "recipe.yaml").write_text(stage.variant.recipe.to_yaml())
        (path / "weights.safetensors").touch()
    same = load_ablation(written(tmp_path), ["evaluation.batch=3", "data.workers=1"])
    assert unfinished(same, 1, home) == [] and len(read_results(same, 1, home)) == 6
    for view in ("clips=3", "crops=1"):
        arguments = ["--run-dir", str(home), "--set", f"evaluation.{view}", "--table"]
        monkeypatch.setattr(sys, "argv", ["ablate.py", str(written(tmp_path)), *arguments])
        assert main() == 2
        message = capsys.readouterr().err
        assert "grid-none-k400-seed0 holds a finished run with other settings" in message
        assert f"evaluation.{view.partition('=')[0]}: " in message and not (home / "table.md").exists()
        with pytest.raises(RecipeError, match=r"evaluation\."):
            unfinished(load_ablation(written(tmp_path), [f"evaluation.{view}"]), 1, home)


def test_a_failed_training_is_named_and_the_next_one_starts(grid: Ablation, tmp_path: Path) -> None:
    stages = unfinished(grid, 1, tmp_path / "runs")
    lines: list[str] = []
    started, command = leaving({stages[1].name: 2})
    code = train_all(stages, tmp_path / "runs", command, None, print_line=lines.append)
    assert code == 2 and started == [stage.name for stage in stages]
    output = tmp_path / "runs" / "output" / f"{stages[1].name}.log"
    assert output.read_text() == f"{stages[1].name}\n"
    assert any(f"failed with exit code 2, see {output}" in line for line in lines)
    assert "about" in lines[1] and "left" in lines[1] and "left" not in lines[-1]


@pytest.mark.parametrize("code", [85, 130])
def test_a_stopped_training_ends_the_ablation(grid: Ablation, tmp_path: Path, code: int) -> None:
    stages = unfinished(grid, 1, tmp_path / "runs")
    started, command = leaving({stages[1].name: code})
    assert train_all(stages, tmp_path / "runs", command, None, print_line=lambda line: None) == code
    assert started == [stage.name for stage in stages[:2]]


def test_check_names_what_is_missing(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["ablate.py", str(written(tmp_path)), "--check"])
    assert main() == 2
    shown = capsys.readouterr()
    assert shown.out.count(" ok") == 6 and "also two: the same again." in shown.out
    assert "train.arrow does not exist" in shown.err
    monkeypatch.setattr(sys, "argv", ["ablate.py", "table9b_motion", "--check"])
    assert main() == 0
    assert parse(["table9b"]).seeds == 1
    with pytest.raises(SystemExit):
        parse(["table9b", "--check", "--seeds", "0"])


@pytest.mark.parametrize("option", ["--dry-run", "--array=3", "--nodes=2", "--time=10", "--no-preflight"])
def test_options_of_jobs_need_slurm(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Without it, --dry-run would train."""
    with pytest.raises(SystemExit) as caught:
        parse(["table9b", option])
    name = option.partition("=")[0]
    assert caught.value.code == 2 and f"{name} is for jobs: add --slurm" in capsys.readouterr().err
    assert parse(["table9b", option, "--slurm"]).slurm


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "file").touch()
    where = ["--run-dir", str(tmp_path / "file" / "runs"), "--set", "tracking.enabled=false"]
    monkeypatch.setattr(sys, "argv", ["ablate.py", str(written(tmp_path)), *where])
    assert main() == 2
    assert f"{tmp_path / 'file' / 'runs'}" in capsys.readouterr().err


def test_an_array_of_what_is_not_finished_is_planned(tmp_path: Path, monkeypatch, capsys) -> None:
    arguments = ["table9b_motion", "--slurm", "--dry-run", "--seeds", "2", "--gpus-per-node", "0"]
    settings = ["--run-dir", str(tmp_path / "runs"), "--array", "4", "--set", "tracking.enabled=false"]
    monkeypatch.setattr(sys, "argv", ["ablate.py", *arguments, *settings])
    assert main() == 0
    script = capsys.readouterr().out
    assert "--array=0-21%4" in script and script.count("set -- --recipe") == 22
    assert "table9b_motion-st-adapter-seed1" in script and not (tmp_path / "runs").exists()
    assert script.count("--set name=") == 22
    assert re.search(r"\n# submitted with: sbatch \S+\.sbatch\n$", script)


TRAINED = f"""\
name: grid
title: A grid
columns:
  - name: motion
    recipe: {SMALL}
    set: [evaluation.clips=1, evaluation.crops=1, optimisation.steps=12, model.overrides.local_mhra=0]
rows:
  - {{name: adapter, set: [model.overrides.temporal_module=st_adapter], paper: {{motion: 2}}}}
  - {{name: fails, set: [model.num_classes=3], paper: {{motion: 3}}}}
  - {{name: shift, set: [model.overrides.temporal_module=temporal_shift], paper: {{motion: 1}}}}
"""


@pytest.mark.soak
def test_an_interrupted_ablation_continues_and_its_runs_have_one_parent(
    tmp_path: Path, motion_set: MotionSet
) -> None:
    from mlflow.tracking import MlflowClient

    for name in ("train", "val"):
        shutil.copy(motion_set.root / f"{name}.arrow", tmp_path)
    shutil.copytree(motion_set.root / "train", tmp_path / "train")
    shutil.copytree(motion_set.root / "val", tmp_path / "val")
    address = f"sqlite:///{tmp_path}/mlflow.db"
    command = [
        sys.executable, str(ROOT / "launch" / "ablate.py"), str(written(tmp_path, TRAINED)),
        "--run-dir", "runs", "--set", "tracking.enabled=true", "--set", f"tracking.uri={address}",
    ]  # fmt: skip
    options = {"cwd": tmp_path, "env": {**os.environ, **python_path()}, "text": True}
    first = tmp_path / "runs" / "grid-adapter-seed0" / "events.jsonl"
    with subprocess.Popen(command, start_new_session=True, **options) as process:
        while not (first.exists() and '"step"' in first.read_text()):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(200) == 85
    done = subprocess.run(command, capture_output=True, timeout=400, **options)
    assert done.returncode == 2, done.stderr
    assert "0 finished, 3 to train" in done.stdout and "grid-fails-seed0: failed" in done.stdout
    starts = [json.loads(line) for line in first.read_text().splitlines() if '"start"' in line]
    assert [event["step"] > 0 for event in starts] == [False, True]  # the second continued
    again = subprocess.run([*command, "--rows", "a|s"], capture_output=True, timeout=400, **options)
    assert "2 finished, 1 to train" in again.stdout
    home = tmp_path / "runs"
    assert not (home / "mlflow.rejected.jsonl").exists()
    parent = find_mlflow_run_id(home)
    client = MlflowClient(address)
    experiment = client.get_run(parent).info.experiment_id
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert {run.info.run_name for run in children} == {"grid-adapter-seed0", "grid-shift-seed0"}
    saved = {file.path for file in client.list_artifacts(parent, "ablation")}
    assert saved == {"ablation/table.md", "ablation/table.json"}
