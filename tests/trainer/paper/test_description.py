"""`launch/describe.py`: the cost of recipes and presets, and the published figures beside it."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from launch.describe import main
from models import ModelError, UniFormerV2
from tests.trainer.inference.weights import write_weights
from trainer.checkpoint.metadata import TrainState, write_state
from trainer.checkpoint.weights import load_weights, save_weights
from trainer.config.load import load_recipe
from trainer.errors import RecipeError, RunError
from trainer.inference.model_source import open_model
from trainer.paper.description import (
    describe,
    describe_named,
    describe_preset,
    describe_recipe,
    published_comparisons,
    with_distinct_names,
)
from trainer.paper.published_costs import RELEASED, Figure, costs_of
from trainer.setup.preparation import model_config

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return published_comparisons()


def test_all_published_rows_are_those_of_the_models_built_here(rows: list[dict[str, Any]]) -> None:
    assert len(rows) == 10 + 28 + 7
    for row in rows:
        if row["source"] == RELEASED:
            assert row["parameters_agree"] and row["flops_agree"] and abs(row["difference"]) < 0.005
            assert f"{row['own_parameters']:,}" == row["parameters"]
        # 354.35 M of BEiT-L/16 are printed as 355 M.
        assert row["parameters_agree"] or row["parameters"] == "355 M"
        assert row["flops_agree"] or abs(row["difference"]) < 0.02 or row["note"]


def test_each_difference_over_two_percent_is_explained(rows: list[dict[str, Any]]) -> None:
    large = [row for row in rows if abs(row["difference"]) > 0.02 and not row["flops_agree"]]
    assert [(row["source"], row["crops"] * row["clips"]) for row in large] == [("table 16", 3)]
    assert all(row["note"] for row in large)


@pytest.mark.parametrize(
    ("text", "ours", "agrees"),
    [
        ("1.8 T", 1.777e12, True),
        ("1.8 T", 1.749e12, False),
        ("16.0 T", 15.95e12, True),
        ("422 G", 421.5e9, True),
        ("422 G", 422.6e9, False),
        ("114,552,208", 114_552_208, True),
        ("114,552,208", 114_552_209, False),
    ],
)
def test_a_figure_agrees_when_rounded(text: str, ours: float, agrees: bool) -> None:
    assert Figure(text).agrees(ours) is agrees


def test_a_recipe_has_its_step_and_the_rows_of_its_structure() -> None:
    plain = describe_recipe(Path("k400_b16"))
    assert (plain.parameters, plain.batch) == (114_552_208, 256)
    assert {row.source for row in costs_of(plain.config)} == {RELEASED, "tables 1, 16"}
    assert plain.step_flops == 256 * 6 * plain.multiply_accumulates
    frozen = describe_recipe(Path("k400_l14_336_8f_frozen"))
    assert round(frozen.trained / 1e6, 2) == 50.92
    assert frozen.step_flops < 512 * 2.2 * frozen.multiply_accumulates
    other = describe_recipe(Path("k400_b16"), ["model.overrides.fusion=parallel"])
    assert other.parameters > plain.parameters and costs_of(other.config) == []
    wide = describe_recipe(Path("k400_b16"), ["engine.precision=fp32"])
    assert wide.activation_bytes == 2 * plain.activation_bytes


@pytest.mark.parametrize(
    ("preset", "classes", "sources"),
    [
        ("b16", 400, {RELEASED, "tables 1, 16"}),
        ("b16", 600, {"tables 1, 16"}),
        ("b16", 10, set()),
        ("l14_336", 339, {"tables 3, 17"}),
    ],
)
def test_a_figure_is_shown_for_the_classes_it_is_published_for(
    preset: str, classes: int, sources: set[str]
) -> None:
    found = describe_preset(preset, form="scene", frames=8, num_classes=classes)
    assert {row.source for row in costs_of(found.config)} == sources


def test_a_preset_has_overrides_with_and_without_their_section() -> None:
    size = {"form": "scene", "frames": 8, "num_classes": 174}
    overrides = ["model.overrides.global_layers=[]", "temporal_module=joint_mhsa"]
    found = describe_preset("b16", **size, overrides=overrides)
    assert found.parameters == 85_939_374
    assert [row.source for row in costs_of(found.config)] == ["table 15"]
    with pytest.raises(ModelError, match="unknown model field 'temporal_modul'"):
        describe_preset("b16", **size, overrides=["temporal_modul=none"])
    with pytest.raises(RunError, match="--set frames: give --frames instead"):
        describe_preset("b16", **size, overrides=["frames=16"])
    with pytest.raises(RunError, match="field=value"):
        describe_preset("b16", **size, overrides=["temporal_module"])
    with pytest.raises(RecipeError, match="no recipe named b61"):
        describe_recipe(Path("b61"))


def test_the_command_prints_tables_and_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["describe.py", *arguments])
        assert main() == 0
        return capsys.readouterr().out

    shown = printed("ssv2_b16_16f", "b16", "--form", "temporal", "--frames", "16")
    assert "162,992,814" in shown and "tables 4, 18" in shown
    (found,) = json.loads(printed("ssv2_b16_16f", "--json"))
    assert found["parameters"] == 162_992_814
    assert {row["source"] for row in found["published"]} == {RELEASED, "tables 4, 18", "table 18"}
    monkeypatch.setattr(sys, "argv", ["describe.py"])
    assert main() == 2 and "--published" in capsys.readouterr().err


def test_weights_and_runs_are_described_by_the_model_of_the_file(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    file = write_weights(run / "weights.safetensors")
    of_file, of_run = describe_named(str(file)), describe_named(f"{run}/")
    assert (of_file.name, of_run.name) == (str(file), "run")
    assert dataclasses.replace(of_file, name="run") == of_run
    assert of_file.parameters == sum(tensor.numel() for tensor in load_weights(file).model.parameters())
    with pytest.raises(RunError, match=r"--set seed=1: the model of .* is fixed"):
        describe_named(str(file), ["seed=1"])
    file.unlink()
    (run / "recipe.yaml").write_text(load_recipe(ROOT / "recipes/k400_b16.yaml").to_yaml())
    of_recipe = describe_named(str(run))
    assert (of_recipe.name, of_recipe.parameters) == ("run", 114_552_208)
    other = tmp_path / "w.pyth"
    other.touch()
    with pytest.raises(RunError, match=r"uniformerv2 convert .*w\.pyth --to own"):
        describe_named(str(other))


def test_a_run_and_its_checkpoint_have_the_step_of_their_recipe(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart", ["model.num_classes=8", "optimisation.global_batch=24"])
    stored = {"class_names": [], "preprocessing": {}, "recipe": json.loads(recipe.model_dump_json())}
    checkpoint = tmp_path / "mine" / "checkpoints" / "step-0000004"
    checkpoint.mkdir(parents=True)
    description = {"model": dataclasses.asdict(model_config(recipe, 8)), **stored}
    write_state(checkpoint, TrainState(4, 96, 0, {}, 4, 1, 0, {}, 0.0, description))
    damaged = checkpoint.with_name("step-0000008")
    damaged.mkdir()
    (damaged / "state.json").write_text("{")
    expected = dataclasses.replace(describe(recipe), name="mine")
    assert (expected.batch, expected.step_flops / expected.multiply_accumulates) == (24, 24 * 6)
    of_run, of_checkpoint = describe_named(str(tmp_path / "mine")), describe_named(str(checkpoint))
    assert (of_run, of_checkpoint.name) == (expected, str(checkpoint))
    shard = checkpoint / "shard-00000.safetensors"
    save_file({"weight": torch.zeros(1)}, shard)
    for read in (describe_named, lambda name: open_model(Path(name), frames=8)):
        with pytest.raises(RunError, match=f"a part of a checkpoint; name the checkpoint, {checkpoint}$"):
            read(str(shard))
    model = UniFormerV2(of_run.config)
    save_weights(tmp_path / "mine" / "weights.safetensors", model.state_dict(), description)
    assert describe_named(str(tmp_path / "mine")) == of_run
    description["recipe"] = {"of": "another version"}
    save_weights(tmp_path / "w.safetensors", model.state_dict(), description)
    assert describe_named(str(tmp_path / "w.safetensors")).batch == 1


def test_models_of_equal_names_are_named_as_given() -> None:
    plain = describe_recipe(Path("k400_b16"))
    given = ["a/run", "k600_b16", "b/run"]
    models = [dataclasses.replace(plain, name=name) for name in ("run", "k600_b16", "run")]
    assert [model.name for model in with_distinct_names(models, given)] == given
    assert with_distinct_names(models[:2], given[:2]) == models[:2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train.arrow", r"train\.arrow is a manifest, which has no model; name a recipe, .* a run directory"),
        ("scores.parquet", r"scores\.parquet is no recipe; name a recipe"),
        ("empty", r"empty is a folder without weights, checkpoint or recipe; .* file of weights$"),
        ("runs", r"runs is a folder without .*, such as .*runs/mine in it"),
        ("mine.yaml", r"mine\.yaml does not exist; .*; did you mean .*/mime\.yaml\?"),
        ("gone/run", r"gone/run does not exist; name a recipe"),
        ("gone.safetensors", r"gone\.safetensors does not exist"),
    ],
)
def test_what_has_no_model_is_named_with_what_has_one(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "recipe.yaml").touch()
    (tmp_path / "mime.yaml").touch()
    for file in ("train.arrow", "scores.parquet"):
        (tmp_path / file).write_bytes(b"\xff")
    with pytest.raises(RunError, match=message):
        describe_named(str(tmp_path / name))


def test_a_misspelt_preset_gets_a_suggestion() -> None:
    with pytest.raises(RecipeError, match=r"no recipe or preset b16x; did you mean b16\?"):
        describe_named("b16x")
    with pytest.raises(RecipeError, match=r"no recipe named kinetics in .*; there are"):
        describe_named("kinetics")
    with pytest.raises(RecipeError, match=r"did you mean k400_b16\?"):
        describe_named("k40_b16")


def test_a_short_side_below_the_resolution_is_refused_as_in_training() -> None:
    with pytest.raises(RecipeError, match=r"augmentation\.max_short_side: 200 is less .* 224"):
        describe_recipe(Path("k400_b16"), ["augmentation.max_short_side=200"])


def test_an_assumed_number_of_classes_has_no_published_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["describe.py", "finetune", *arguments])
        assert main() == 0
        return capsys.readouterr().out

    shown = printed()
    assert "Published" not in shown and "finetune: without model.num_classes, 400 classes" in shown
    assert json.loads(printed("--json"))[0]["published"] == []
    shown = printed("--set", "model.num_classes=400")
    assert "tables 1, 16" in shown and "assumed" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["k400_b16", "--classes", "10"], "of a recipe, give --set model.num_classes=VALUE"),
        (["k400_b16", "--form", "temporal"], "of a recipe, give --set model.form=VALUE"),
        (["--published", "b16"], "--published is about all published models"),
        (["--published", "--set", "depth=3"], "--published is about all published models"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["describe.py", *arguments])
    assert main() == 2 and message in capsys.readouterr().err
