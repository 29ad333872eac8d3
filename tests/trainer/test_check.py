"""`--check`: the figures for what is not here, and for what is."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models import ModelError
from pipelines import DataError
from pipelines.manifest import Row, write_manifest
from trainer import RunError
from trainer.check import check
from trainer.recipe.file import load_recipe

RECIPE = """\
name: test
model: {preset: l14, form: temporal, frames: 16, num_classes: 174}
data: {train: train.arrow, val: val.arrow}
optimisation: {global_batch: 128, steps: 100, learning_rate: 1e-5}
engine: {zero_stage: auto, micro_batch: auto, recomputed_blocks: auto}
"""

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so none is assumed")


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    (tmp_path / "recipe.yaml").write_text(RECIPE)

    def run(*overrides: str, ranks: int | None = None) -> str:
        assert check(load_recipe(Path("recipe.yaml"), overrides), ranks) == 0
        return capsys.readouterr().out

    return run


@needs_no_gpu
def test_with_ranks_a_gpu_is_assumed_and_the_layout_for_it_is_told(say) -> None:
    text = say(ranks=8)
    assert "there are 80.0 of a GPU, assumed since there is none here" in text
    assert "(ZeRO 1, bf16)" in text
    for line in (
        "engine.micro_batch auto: 16 clips,",
        "batch norms see 128 clips",
        "recomputed_blocks auto: 0",
    ):
        assert line in text, line
    assert "8 ranks x 16 clips x 1 accumulated" in text


def test_on_a_cpu_it_is_the_memory_of_this_machine(say) -> None:
    text = say("model.preset=tiny", "engine.device=cpu")
    assert "of this machine's memory" in text
    assert "fp32)" in text


@needs_no_gpu
def test_what_fits_nowhere_is_refused_and_what_was_asked_for_is_only_told(say) -> None:
    large = ("model.preset=l14_336", "model.frames=512", "engine.precision=fp32")
    with pytest.raises(RunError, match="the training does not fit: 1 clip a rank"):
        say(*large, ranks=1)
    given = ("engine.zero_stage=1", "engine.micro_batch=16", "engine.recomputed_blocks=0")
    text = say(*large, *given, ranks=8)
    assert "GiB, too much: " in text
    assert "chosen for this memory" not in text


def test_what_a_run_renders_itself_is_not_missing(say) -> None:
    lines = [f"  - data.{name}: {name}.arrow" for name in ("train", "val")]
    on_cpu = ("model.preset=tiny", "engine.device=cpu")
    of_itself = say(*on_cpu, "data.embedded={train_clips: 100, val_clips: 20}")
    assert all(line in of_itself.partition("rendered at the start")[2] for line in lines)
    assert "nothing is missing" in of_itself
    text = say(*on_cpu)
    assert "rendered at the start" not in text
    assert all(line in text.partition("missing on this machine")[2] for line in lines)


def test_image_weights_that_do_not_fit_are_refused_before_the_run(say, tmp_path: Path) -> None:
    save_file({"visual.conv1.weight": torch.zeros(64, 3, 16, 16)}, tmp_path / "w.safetensors")
    on_cpu = ("model.preset=tiny", "engine.device=cpu", "model.image_weights=w.safetensors")
    with pytest.raises(ModelError, match=r"w\.safetensors holds no image weights that can be loaded"):
        say(*on_cpu)
    (tmp_path / "w.safetensors").unlink()
    assert "model.image_weights: w.safetensors" in say(*on_cpu).partition("missing on this machine")[2]


def test_manifests_of_different_classes_are_refused_as_a_run_does(say, tmp_path: Path) -> None:
    row = Row("v.mp4", 0, 0, 0, 10, 25.0, 64, 48, "h264")
    write_manifest(tmp_path / "train.arrow", [row], ["cat", "dog"])
    write_manifest(tmp_path / "val.arrow", [row], ["cat", "fox"])
    with pytest.raises(DataError, match="label 1 is 'dog' in the first and 'fox' in the second"):
        say("model.preset=tiny", "engine.device=cpu")
