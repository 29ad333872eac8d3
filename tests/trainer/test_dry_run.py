"""`--check`: the printed figures, and the reasons why a run could not start."""

import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipelines.dataset.manifest import ManifestRow, SourceKind, write_manifest
from pipelines.synthetic.video_writer import MJPEG, encode_video
from tests.pipelines.jpegs import write_frames
from trainer.checkpoint.metadata import TrainState, write_state
from trainer.config.load import load_recipe
from trainer.dry_run import check
from trainer.engine.memory_estimate import GIB, AvailableMemory
from trainer.errors import RunError
from trainer.monitoring.run_dir import RunDir
from trainer.setup.preparation import BATCH_NORM_CLIPS, prepare, resume_settings

RECIPES = Path(__file__).parents[2] / "recipes"

RECIPE = """\
name: test
model: {preset: l14, form: temporal, frames: 16, num_classes: 174}
data: {train: train.arrow, val: val.arrow}
optimisation: {global_batch: 128, steps: 100, learning_rate: 1e-5}
engine: {zero_stage: auto, micro_batch: auto, recomputed_blocks: auto}
"""

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so none is assumed")


@pytest.fixture
def check_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    (tmp_path / "recipe.yaml").write_text(RECIPE)

    def run(*overrides: str, ranks: int | None = None, **options) -> str:
        """The output, followed by REFUSED and the reasons if the run could not start."""
        recipe = load_recipe(Path("recipe.yaml"), overrides)
        try:
            assert check(recipe, RunDir(tmp_path / "run"), ranks, **options) == 0
        except RunError as error:
            return f"{capsys.readouterr().out}\nREFUSED {error}"
        return capsys.readouterr().out

    return run


@pytest.fixture
def videos(tmp_path: Path) -> list[ManifestRow]:
    """Rows of videos that can be opened, with manifests of them."""
    (tmp_path / "videos").mkdir()
    rows = []
    for number in range(4):
        pictures = np.full((2, 48, 64, 3), 60 * number, np.uint8)
        encode_video(tmp_path / f"videos/{number}.avi", pictures, MJPEG, Fraction(25), keyframe_interval=1)
        rows.append(ManifestRow(f"videos/{number}.avi", 0, 0, number % 2, 2, 25.0, 64, 48, "mjpeg"))
    for name in ("train", "val"):
        write_manifest(tmp_path / f"{name}.arrow", rows, ["cat", "dog"])
    return rows


ON_CPU = ("model.preset=tiny", "engine.device=cpu")


@pytest.mark.parametrize("name", ["ssv1_b16_16f", "ssv1_l14_32f", "anet_l14_16f", "hacs_l14_32f"])
def test_the_recipes_of_frames_and_segments_are_checked_with_such_manifests(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    pictures = np.full((30, 48, 64, 3), 60, np.uint8)
    encode_video(tmp_path / "a.avi", pictures, MJPEG, Fraction(25), keyframe_interval=1)
    write_frames(tmp_path / "1", pictures)
    file = ManifestRow("a.avi", 0, 0, 0, 30, 25.0, 64, 48, "mjpeg")
    segment = replace(file, frames=9, first_frame=20, video_frames=30)
    frames = replace(file, path="1", fps=12.0, codec="jpeg", source=SourceKind.FRAMES)
    something = name.startswith("ssv1")
    classes = [f"class {number}" for number in range(174 if something else 200)]
    data = []
    for split, row in (("train", frames if something else segment), ("val", frames if something else file)):
        path = tmp_path / f"{split}.arrow"
        write_manifest(path, [row] * 300, classes, sources=True)
        data.append(f"data.{split}={path}")
    recipe = load_recipe(RECIPES / f"{name}.yaml", [*data, "model.weights=null", "tracking.enabled=false"])
    assert check(recipe, RunDir(tmp_path / "run"), 8) == 0
    assert "nothing is missing" in capsys.readouterr().out
    assert (recipe.evaluation.clips, recipe.evaluation.crops) == ((1, 3) if something else (10, 3))


def refusal(text: str) -> str:
    assert "nothing is missing" not in text
    return text.partition("REFUSED a run could not start here:")[2]


@needs_no_gpu
def test_with_ranks_the_batch_plan_is_for_an_assumed_gpu(check_output) -> None:
    text = check_output(ranks=8)
    assert "there are 80.0 GiB of an assumed GPU" in text
    assert "(ZeRO 1, bf16)" in text
    for line in (
        "engine.micro_batch auto: 16 clips,",
        "batch norms average over 128 clips",
        "recomputed_blocks auto: 0",
    ):
        assert line in text, line
    assert "8 ranks x 16 clips x 1 accumulated" in text


@needs_no_gpu
def test_fp8_is_named_and_noted_where_it_is_slower_on_paper(check_output) -> None:
    small = "overrides: {depth: 2, global_layers: [1]}"
    fixed = (
        "engine={micro_batch: 16, fp8: true}",
        f"model={{preset: b16, form: scene, frames: 8, {small}}}",
    )
    text = check_output(*fixed, ranks=8)
    assert "bf16, products of the blocks' linear layers in FP8" in text
    (note,) = [line for line in text.splitlines() if "engine.fp8 makes a step slower" in line]
    times = re.search(
        r"([\d.]+) ms a clip, ([\d.]+) without .* set engine.compile to true \(([\d.]+) ms\)", note
    )
    assert times is not None
    uncompiled, plain, compiled = map(float, times.groups())
    assert uncompiled > plain > compiled
    assert "makes a step slower" not in check_output(*fixed, "engine.compile=true", ranks=8)
    assert "FP8" not in check_output(*fixed, "engine.fp8=false", ranks=8)


def test_on_a_cpu_the_memory_of_this_machine_counts(check_output) -> None:
    text = check_output("model.preset=tiny", "engine.device=cpu")
    assert "of this machine's memory" in text
    assert "fp32)" in text


@needs_no_gpu
def test_auto_that_cannot_fit_is_refused_and_given_values_have_advice(check_output) -> None:
    large = ("model.preset=l14_336", "model.frames=512", "engine.precision=fp32")
    assert "the training does not fit: 1 clip per rank" in refusal(check_output(*large, ranks=1))
    given = ("engine.zero_stage=1", "engine.micro_batch=16", "engine.recomputed_blocks=0")
    text = check_output(*large, *given, ranks=8)
    assert "GiB, too much for the device: " in text
    assert "engine: auto and evaluation.batch: " in text.partition("changes that make it fit")[2]
    assert "chosen for this memory" not in text


def test_an_embedded_data_set_is_not_missing(check_output) -> None:
    lines = [f"  - data.{name}: {name}.arrow" for name in ("train", "val")]
    of_itself = check_output(*ON_CPU, "data.embedded={train_clips: 100, val_clips: 20}")
    assert all(line in of_itself.partition("rendered at the start")[2] for line in lines)
    assert "nothing is missing" in of_itself
    text = check_output(*ON_CPU)
    assert "rendered at the start" not in text
    for name in ("train", "val"):
        assert f"  - data.{name}: no manifest at {name}.arrow" in refusal(text)
    other = check_output(*ON_CPU, "data.embedded={train_clips: 100, val_clips: 20}", "data.train=x.arrow")
    assert "data.embedded renders ./train.arrow" in refusal(other)


def test_weights_that_do_not_fit_are_refused_unless_the_run_resumes(check_output, tmp_path: Path) -> None:
    save_file({"visual.conv1.weight": torch.zeros(64, 3, 16, 16)}, tmp_path / "w.safetensors")
    weights = (*ON_CPU, "model.weights=w.safetensors")
    assert "w.safetensors holds no image weights that can be loaded" in refusal(check_output(*weights))
    (tmp_path / "w.safetensors").unlink()
    assert "model.weights: w.safetensors does not exist" in refusal(check_output(*weights))
    (tmp_path / "run" / "checkpoints" / "step-0000004").mkdir(parents=True)
    assert "model.weights" not in refusal(check_output(*weights))


def test_a_complete_recipe_passes_and_no_file_is_written(check_output, videos, tmp_path) -> None:
    before = sorted(tmp_path.rglob("*"))
    text = check_output(*ON_CPU)
    assert "nothing is missing on this machine" in text
    assert "4 of 4 validation videos are also in training" in text.partition("notes")[2]
    assert sorted(tmp_path.rglob("*")) == before


def test_all_reasons_are_reported_at_once(check_output, videos, tmp_path: Path) -> None:
    write_manifest(tmp_path / "val.arrow", videos, ["cat", "fox"])
    (tmp_path / "videos").rename(tmp_path / "moved")
    reasons = refusal(check_output(*ON_CPU, "tracking.uri=htp://x", resume="never-there"))
    for token in (
        "tracking.uri: 'htp://x'",
        "--resume never-there: there is no such checkpoint folder",
        f"none of 4 videos of data.train (train.arrow) was found under {tmp_path}/videos, a folder that",
        "of data.val (val.arrow) was found under",
        "label 1 is 'dog' in the first and 'fox' in the second",
    ):
        assert reasons.count(token) == 1, token


def test_more_classes_than_the_head_has_are_refused(check_output, videos) -> None:
    assert "has 2 classes, the model 1" in refusal(check_output(*ON_CPU, "model.num_classes=1"))


def test_tolerated_bad_videos_are_noted(check_output, videos, tmp_path: Path) -> None:
    """Half of the opened videos are bad; three in ten of the manifest may be."""
    write_manifest(tmp_path / "train.arrow", videos * 10, ["cat", "dog"])
    for number in (1, 2):
        (tmp_path / f"videos/{number}.avi").write_bytes(b"")
    token = "4 of 8 tried videos of data.train (train.arrow) cannot be used; the first: "
    many = (*ON_CPU, "data.bad_share=0.3")
    text = check_output(*many)
    assert token in text.partition("\nnotes")[2] and "nothing is missing" in text
    assert token in refusal(check_output(*ON_CPU))
    for number in (0, 3):
        (tmp_path / f"videos/{number}.avi").write_bytes(b"")
    assert "none of 8 tried videos of data.train (train.arrow) can be used" in refusal(check_output(*many))


def test_a_run_folder_that_cannot_be_created_is_refused(check_output, videos, tmp_path: Path) -> None:
    (tmp_path / "run").touch()  # root may write anywhere except below a file
    reasons = refusal(check_output(*ON_CPU))
    assert f"the run folder {tmp_path}/run cannot be written" in reasons and "Not a directory" in reasons


def test_a_checkpoint_of_another_training_and_unknown_names_are_refused(
    check_output, videos, tmp_path
) -> None:
    checkpoint = tmp_path / "run/checkpoints/step-0000003"
    checkpoint.mkdir(parents=True)
    state = TrainState(3, 0, 0, {}, 3, 1, 1, {"seed": 1}, 0.0, {})
    write_state(checkpoint, state)
    reasons = refusal(check_output(*ON_CPU))
    assert "step-0000003 is of another training" in reasons and "seed: 1 then, 0 now" in reasons
    assert "--allow-change 'sed'" in refusal(check_output(*ON_CPU, allowed=["sed"]))
    for resume in ("never-there", tmp_path / "run"):
        assert refusal(check_output(*ON_CPU, resume=str(resume))).count(str(resume)) == 1


def test_an_assumed_number_of_batch_norm_clips_is_noted(check_output, videos, tmp_path: Path) -> None:
    recipe = load_recipe(Path("recipe.yaml"), ON_CPU)
    kept = resume_settings(recipe, prepare(recipe, 1, AvailableMemory("cpu", 8 * GIB)))
    checkpoint = tmp_path / "run/checkpoints/step-0000003"
    checkpoint.mkdir(parents=True)

    def keep(**others: object) -> None:
        write_state(checkpoint, TrainState(3, 0, 0, {}, 3, 16, 1, {**kept, **others}, 0.0, {}, 1))

    keep(**{BATCH_NORM_CLIPS: 512})
    fixed = "engine.micro_batch=2"
    for text in (check_output(*ON_CPU), check_output(*ON_CPU, ranks=2), check_output(*ON_CPU, fixed)):
        assert "nothing is missing" in text
        notes = text.partition("\nnotes")[2]
        assert f"which --check assumes: {BATCH_NORM_CLIPS}: 512 in checkpoint {checkpoint}, " in notes
    assert f"{BATCH_NORM_CLIPS}: 512 then, 4 now" in refusal(check_output(*ON_CPU, fixed, ranks=2))
    assert "--check assumes" not in check_output(*ON_CPU, allowed=[BATCH_NORM_CLIPS])
    keep(**{BATCH_NORM_CLIPS: 16})
    assert "16 clips, with which a batch norm sees 16 clips, as before" in check_output(*ON_CPU)
    keep(**{BATCH_NORM_CLIPS: 512, "seed": 1})
    reasons = refusal(check_output(*ON_CPU))
    assert "seed: 1 then, 0 now" in reasons and BATCH_NORM_CLIPS not in reasons


def test_lines_fit_a_terminal_of_80_columns(
    check_output, videos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lost = tmp_path / "videos/0.avi"
    lost.unlink()
    recipe = ("engine.device=cpu", "engine.precision=fp32", "tracking.uri=htp://x", "optimisation.steps=5")
    text = check_output(*recipe, "model.preset=tiny", "model.frames=8", ranks=2)
    for token in ("tracking.uri", "chosen for this memory", "1 of 4 videos of data.train"):
        assert token in text
    long = [line for line in text.splitlines() if len(line) > 80]
    # Paths are not broken; under xdist the path of the test's folder is long.
    assert [line for line in long if tmp_path.name not in line] == []


def test_what_the_largest_short_side_does_to_the_videos(check_output, videos: list[ManifestRow]) -> None:
    sizes = [(64, 48), (40, 90), (32, 32), (90, 41)]
    rows = [replace(row, width=w, height=h) for row, (w, h) in zip(videos, sizes, strict=True)]
    write_manifest(Path("train.arrow"), rows, ["cat", "dog"])
    small = (*ON_CPU, "model.num_classes=2", "model.overrides={resolution: 32}")
    assert "max_short_side: 40 scales down 50 % of the training videos" in check_output(
        *small, "augmentation.max_short_side=40"
    )
    assert "max_short_side: 48 has no effect" in check_output(*small, "augmentation.max_short_side=48")
    assert "max_short_side" not in check_output(*small)
