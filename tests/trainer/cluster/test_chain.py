"""Chains of recipes: what each stage starts from, and which stages are finished."""

import itertools
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.chain import main, parse, train
from trainer.cluster.chain import CHAINS, Stage, is_finished, load_chain
from trainer.config.load import load_recipe
from trainer.errors import RecipeError

TWO = """\
name: two
stages:
  - recipe: quickstart
    set: [name=first]
  - recipe: quickstart
    set: [name=second, seed=7]
"""


def written(folder: Path, text: str = TWO) -> Path:
    path = folder / "two.yaml"
    path.write_text(text)
    return path


def finish(stage: Stage) -> None:
    """Leave what the program leaves of a finished run."""
    stage.run_dir.mkdir(parents=True)
    (stage.run_dir / "recipe.yaml").write_text(stage.variant.recipe.to_yaml())
    (stage.run_dir / "events.jsonl").write_text(json.dumps({"event": "end", "time": 1.0}) + "\n")
    (stage.run_dir / "weights.safetensors").write_bytes(b"")


@pytest.mark.parametrize("path", sorted(CHAINS.glob("*.yaml")), ids=lambda path: path.stem)
def test_each_stage_starts_from_the_run_before(path: Path) -> None:
    stages = load_chain(Path(path.stem))
    assert len({stage.run_dir for stage in stages}) == len(stages)
    for before, stage in itertools.pairwise(stages):
        assert stage.variant.recipe.model.weights == before.run_dir / "weights.safetensors"
    alone = load_recipe(stages[0].variant.path)
    assert stages[0].variant.recipe.model.weights == alone.model.weights


def test_overrides_of_the_chain_come_before_those_of_a_stage(tmp_path: Path) -> None:
    first, second = load_chain(written(tmp_path), ["seed=3", "optimisation.epochs=2"], tmp_path / "runs")
    assert (first.variant.recipe.seed, second.variant.recipe.seed) == (3, 7)
    assert second.variant.recipe.optimisation.epochs == 2
    assert second.run_dir == tmp_path / "runs" / "second"
    assert second.variant.recipe.model.weights == tmp_path / "runs" / "first" / "weights.safetensors"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TWO.replace("first", "second"), "stage 2: its run directory"),
        (TWO.replace("seed=7", "sed=7"), "stage 2: .*sed: no such field"),
        (TWO.replace("recipe: quickstart", "recipe: quickstrat", 1), "stage 1: .*did you mean quickstart"),
        (TWO.replace("    set", "    sets", 1), "two.yaml:4: stages.0.sets"),
        ("name: one\nstages: []\n", "two.yaml:2: stages"),
        ("- a\n", "a chain is a mapping"),
        (
            "base: quickstart\nseed: 1\n",
            r"\A.*two.yaml: this is a recipe and not a chain; name a chain, or [^\n]*\Z",
        ),
        ("seed: 1\nstages: []\n", "two.yaml:2: stages: .*\n.*seed: no such field"),
    ],
)
def test_a_mistake_is_named_with_its_stage_or_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_chain(written(tmp_path, text))


def test_an_unknown_chain_lists_those_that_exist(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["chain.py", "k400_l15"])
    assert main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: there is no chain k400_l15; did you mean k400_b16? There are: ")
    assert "k400_l14_336_64f" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run"], "--dry-run is for jobs: add --slurm"),
        (["--cpus-per-rank", "2"], "--cpus-per-rank is for jobs: add --slurm"),
        (["--check", "--ranks", "0"], "--ranks is a number of at least 1, and for --check"),
        (["--ranks", "2"], "--ranks is a number of at least 1, and for --check"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(["k400_b16", *arguments])
    assert message in capsys.readouterr().err


def test_scripts_that_are_only_printed_have_the_command_that_submits_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--run-dir",
        str(tmp_path / "runs"),
        "--slurm",
        "--nodes",
        "1",
        "--gpus-per-node",
        "0",
        "--dry-run",
    ]
    monkeypatch.setattr(sys, "argv", ["chain.py", str(written(tmp_path)), *options])
    assert main() == 0
    first, second = capsys.readouterr().out.split("\n\n#!/bin/bash\n")
    assert first.startswith("#!/bin/bash\n") and second.endswith("\n\n")
    assert f"\n# submitted with: sbatch {tmp_path}/runs/" in first and "--dependency" not in first
    (name,) = re.findall(r"^#SBATCH --job-name=(\S+)", first, re.MULTILINE)
    waits = f"--dependency=afterok:JOB_OF_{name} --kill-on-invalid-dep=yes"
    assert second.splitlines()[-2].startswith(f"# submitted with: sbatch {waits} {tmp_path}/runs/")
    missing = ("data.embedded=null", "data.train=none.arrow", "data.val=none.arrow")
    without_data = [part for text in missing for part in ("--set", text)]
    monkeypatch.setattr(sys, "argv", [*sys.argv, *without_data])
    assert main() == 0 and "data.train=none.arrow" in capsys.readouterr().out
    sys.argv.remove("--dry-run")
    assert main() == 2 and "no manifest at none.arrow; make it" in capsys.readouterr().err


def test_a_missing_file_is_named_in_plain_words(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"cannot read a chain from .*none\.yaml: No such file or directory$"
    ):
        load_chain(tmp_path / "none.yaml")


def test_a_finished_stage_is_skipped_unless_its_settings_differ(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    chain, home = written(tmp_path), tmp_path / "runs"
    stages = load_chain(chain, home=home)
    assert not any(map(is_finished, stages))
    for stage in stages:
        finish(stage)
    assert train(stages) == 0
    assert "stage 2 of 2: second, finished" in capfd.readouterr().out
    other = load_chain(chain, ["optimisation.learning_rate=0.5", "engine.micro_batch=1"], home)
    with pytest.raises(RecipeError, match=r"optimisation\.learning_rate: 0\.001 then, 0\.5 now\. Choose"):
        is_finished(other[0])
    unimportant = ["data.bad_share=0.5", "data.workers=1", "optimisation.skipped_steps=3"]
    assert all(map(is_finished, load_chain(chain, unimportant, home)))
    (stages[0].run_dir / "weights.safetensors").unlink()
    assert not is_finished(stages[0])


def test_a_signal_reaches_the_child_whose_exit_code_counts(tmp_path: Path) -> None:
    child = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))\n"
        f"pathlib.Path({str(tmp_path / 'ready')!r}).touch()\n"
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", child]
    parent = f"from trainer.system.child_process import run_child; exit(run_child({command}))"
    with subprocess.Popen([sys.executable, "-c", parent]) as process:
        while not (tmp_path / "ready").exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)  # a Ctrl-C, which the terminal also sends to the child
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 85
