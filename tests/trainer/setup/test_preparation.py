"""Resolution of a recipe before a run: data, model, batch and resume settings."""

import json
import pickle
from itertools import pairwise
from pathlib import Path

import pytest

from pipelines.dataset.concat import Dataset
from pipelines.dataset.manifest import Manifest, ManifestRow, write_manifest
from pipelines.errors import DataError
from tests.pipelines.damaged_manifests import change_rows
from trainer.checkpoint.metadata import TrainState
from trainer.config.load import load_recipe
from trainer.config.schema import Recipe
from trainer.distributed.manifest_cache import open_manifest
from trainer.engine.memory_estimate import GIB, AvailableMemory
from trainer.errors import RecipeError, RunError
from trainer.setup.plan_notes import fp8_notes, plan_change_notes
from trainer.setup.preparation import (
    BATCH_NORM_CLIPS,
    Preparation,
    check_decoder,
    model_config,
    prepare,
    resume_settings,
)

RECIPE = """\
name: test
model: {preset: tiny, form: scene, frames: 4, overrides: {resolution: 32, patch_size: 16}}
data: {train: train.arrow, val: val.arrow}
sampling: {repeats: 2}
optimisation: {global_batch: 16, epochs: 2, learning_rate: 1e-3}
"""
PLAIN = ("jump", "run")
SIDED = ("move_left", "move_right", "jump")


def made(
    path: Path, count: int, classes: tuple[str, ...] = PLAIN, weights: list[float] | None = None
) -> Manifest:
    rows = (
        ManifestRow(f"{i}.mp4", 0, 0, i % 2, 10, 25.0, 64, 48, "vp9", 1.0 if weights is None else weights[i])
        for i in range(count)
    )
    return write_manifest(path, rows, classes, weighted=weights is not None)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three manifests for training, one of them with weights, and one for validation."""
    monkeypatch.chdir(tmp_path)
    made(tmp_path / "train.arrow", 40)
    made(tmp_path / "more.arrow", 20)
    made(tmp_path / "weighted.arrow", 10, weights=[0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    made(tmp_path / "val.arrow", 8)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def recipe(*overrides: str) -> Recipe:
    return load_recipe("recipe.yaml", overrides)


def prepared(*overrides: str) -> Preparation:
    return prepare(recipe(*overrides), world_size=2, available=AvailableMemory("cpu", 16 * GIB))


def shares(made: Preparation, steps: int) -> list[float]:
    """The share of each training manifest in the first steps."""
    sampler, bounds = made.sampler, [*made.train.starts, len(made.train)]
    samples = [sampler.slot(step, place).sample for step in range(steps) for place in range(16)]
    return [
        sum(begin <= sample < end for sample in samples) / len(samples) for begin, end in pairwise(bounds)
    ]


def test_one_manifest_is_one_permutation_per_epoch(folder: Path) -> None:
    made = prepared()
    assert (len(made.train), len(made.val), made.sampler.parts) == (40, 8, ())
    assert made.sampler.steps_per_epoch == 5
    assert (made.layout.micro_batch, made.layout.accumulation, made.notes) == (8, 1, ())
    assert made.train.class_names == PLAIN
    assert (
        resume_settings(recipe(), made)["data.train (fingerprint)"]
        == Manifest.open("train.arrow").fingerprint
    )
    assert resume_settings(recipe(), made)["data.train (ratios)"] is None


def test_manifests_without_ratios_are_shuffled_as_one(folder: Path) -> None:
    made = prepared("data.train=[train.arrow, more.arrow]")
    assert made.sampler.parts == ()
    slots = [made.sampler.slot(step, place) for step in range(8) for place in range(0, 16, 2)]
    assert sorted(slot.sample for slot in slots if slot.epoch == 0) == list(range(60))


def test_each_batch_has_the_ratios_of_the_manifests(folder: Path) -> None:
    mixed = "data.train=[{manifest: train.arrow, ratio: 1}, {manifest: more.arrow, ratio: 3}]"
    made = prepared(mixed)
    assert shares(made, 1) == shares(made, 50) == [0.25, 0.75]
    assert made.sampler.steps_per_epoch == 60 / 8
    other = "data.train=[{manifest: train.arrow, ratio: 1}, {manifest: more.arrow, ratio: 2}]"
    one, two = resume_settings(recipe(mixed), made), resume_settings(recipe(other), prepared(other))
    assert {name for name in one if one[name] != two[name]} == {"data.train (ratios)"}


def test_weights_apply_within_a_manifest_and_row_counts_between_manifests(folder: Path) -> None:
    made = prepared("data.train=weighted.arrow")
    slots = [made.sampler.slot(step, place) for step in range(90) for place in range(0, 16, 2)]
    counts = [sum(slot.sample == sample for slot in slots) / len(slots) for sample in range(10)]
    assert counts == pytest.approx([weight / 45 for weight in range(10)], abs=0.01)
    assert len({(slot.epoch, slot.draw) for slot in slots}) == len(slots)
    again = pickle.loads(pickle.dumps(made.sampler))  # as it is sent to the worker processes
    assert again.slot(80, 3) == made.sampler.slot(80, 3)
    assert len(pickle.dumps(made.sampler)) < 1000
    both = prepared("data.train=[train.arrow, weighted.arrow]")
    assert shares(both, 50) == pytest.approx([0.8, 0.2], abs=0.01)


def test_training_and_validation_must_name_the_same_classes(folder: Path) -> None:
    made(folder / "other.arrow", 4, ("jump", "walk"))
    difference = "label 1 is 'run' in the first and 'walk' in the second"
    with pytest.raises(DataError, match=difference):
        prepared("data.val=other.arrow")
    with pytest.raises(DataError, match=difference):
        prepared("data.train=[train.arrow, other.arrow]")
    with pytest.raises(RunError, match=r"has 2 classes, the model 1; set model\.num_classes to 2"):
        prepared("model.num_classes=1")


@pytest.mark.parametrize("field", ["data.val=empty.arrow", "data.train=[train.arrow, empty.arrow]"])
def test_a_manifest_without_videos_is_refused(folder: Path, field: str) -> None:
    made(folder / "empty.arrow", 0)
    with pytest.raises(DataError, match=r"empty\.arrow lists no video"):
        prepared(field)


def test_a_flip_that_contradicts_the_labels_is_disabled_with_a_note(folder: Path) -> None:
    made(folder / "train.arrow", 40, SIDED)
    made(folder / "val.arrow", 8, SIDED)
    left_out = prepared("augmentation.flip=0.5")
    assert left_out.train_clip.flip == 0
    (note,) = left_out.notes
    assert note.startswith("clips are not flipped, although augmentation.flip is 0.5: 2 of the classes")
    assert "(move_left, move_right)" in note and "augmentation.flip_left_right" in note
    agreed = prepared("augmentation.flip=0")
    assert (agreed.train_clip.flip, agreed.notes) == (0, ())
    forced = prepared("augmentation.flip=0.3", "augmentation.flip_left_right=true")
    assert (forced.train_clip.flip, forced.notes) == (0.3, ())


def test_other_classes_are_flipped(folder: Path) -> None:
    made = prepared("augmentation.flip=0.5")
    assert (made.train_clip.flip, made.notes) == (0.5, ())


def changed(*overrides: str) -> set[str]:
    """The resume settings that these overrides change."""
    one, two = (
        resume_settings(recipe(), prepared()),
        resume_settings(recipe(*overrides), prepared(*overrides)),
    )
    assert json.loads(json.dumps(one)) == one  # as a checkpoint keeps it
    return {name for name in {*one, *two} if one.get(name) != two.get(name)}


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("seed=1", {"seed"}),
        ("model.frames=8", {"model.frames"}),
        ("model.overrides.head_dropout=0.1", {"model.overrides.head_dropout"}),
        ("model.overrides.drop_path=0.1", {"model.overrides.drop_path"}),
        ("data.train=more.arrow", {"data.train (fingerprint)"}),
        ("sampling.shuffle=false", {"sampling.shuffle"}),
        ("augmentation.color_jitter=0.1", {"augmentation.color_jitter"}),
        ("augmentation.flip=0.1", {"augmentation.flip"}),
        ("optimisation.epochs=3", {"optimisation.epochs"}),
        ("optimisation.learning_rate=1e-4", {"optimisation.learning_rate"}),
        ("optimisation.layer_decay=0.7", {"optimisation.layer_decay"}),
        ("optimisation.ema_decay=0.9", {"optimisation.ema_decay"}),
    ],
)
def test_a_setting_that_changes_results_is_a_resume_setting(
    folder: Path, override: str, names: set[str]
) -> None:
    assert changed(override) == names


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "optimisation.skipped_steps=3",
        "engine.micro_batch=2",
        "engine.recomputed_blocks=2",
        "engine.zero_stage=3",
        "evaluation.clips=3",
        "run.keep_last=1",
        "data.workers=1",
        "augmentation.flip_left_right=true",
    ],
)
def test_a_setting_that_does_not_change_results_is_no_resume_setting(folder: Path, override: str) -> None:
    assert changed(override) == set()


def test_products_in_fp8_need_multiples_of_16(folder: Path) -> None:
    assert model_config(recipe("engine.fp8=true"), 2).width % 16 == 0
    narrow = ("model.overrides.width=40", "model.overrides.heads=4")
    assert model_config(recipe(*narrow), 2).width == 40
    with pytest.raises(RecipeError, match=r"engine\.fp8: the model's width is 40, .* multiples of 16"):
        model_config(recipe(*narrow, "engine.fp8=true"), 2)
    with pytest.raises(RecipeError, match=r"engine\.fp8: the model's width x mlp_ratio is 40"):
        model_config(
            recipe(
                "model.overrides.width=32",
                "model.overrides.heads=4",
                "model.overrides.mlp_ratio=1.25",
                "engine.fp8=true",
            ),
            2,
        )


def test_products_in_fp8_on_a_cpu_have_a_note(folder: Path) -> None:
    fp8 = prepared("engine.fp8=true")
    (note,) = fp8_notes(recipe("engine.fp8=true"), fp8.config, fp8.layout, 2, "cpu")
    assert note.startswith("engine.fp8 makes a step slower") and note.endswith(": set engine.fp8 to false")


def test_the_resolved_flip_is_the_resume_setting(folder: Path) -> None:
    made(folder / "train.arrow", 40, SIDED)
    made(folder / "val.arrow", 8, SIDED)
    assert changed("augmentation.flip=0") == set()
    assert changed("augmentation.flip_left_right=true") == {"augmentation.flip"}


def test_with_batch_norm_its_number_of_clips_is_a_resume_setting(folder: Path) -> None:
    temporal = ("model.form=temporal",)
    one = resume_settings(recipe(*temporal), prepared(*temporal))
    less = (*temporal, "engine.micro_batch=2")
    two = resume_settings(recipe(*less), prepared(*less))
    assert {name: (one[name], two[name]) for name in one if one[name] != two[name]} == {
        "clips that a batch norm sees (engine.micro_batch x ranks)": (16, 4)
    }


def resumed(ranks: int, micro_batch: int | None, stage: int = 1, **settings: int) -> TrainState:
    """Of a checkpoint of so many ranks."""
    return TrainState(3, 0, 0, {}, 3, ranks, stage, settings, 0.0, {}, micro_batch)


def test_auto_keeps_the_plan_of_the_checkpoint(folder: Path) -> None:
    available, temporal = AvailableMemory("cpu", 16 * GIB), "model.form=temporal"
    seen = {BATCH_NORM_CLIPS: 4}

    def plan(state: TrainState, *overrides: str) -> tuple[int, int, bool]:
        """Stage and micro-batch of two ranks that resume, and whether there is a note of a change."""
        auto = recipe("engine=auto", *overrides)
        layout = prepare(auto, 2, available, resumed=state).layout
        return layout.zero_stage, layout.micro_batch, plan_change_notes(auto, layout, state, 2) != ()

    assert plan(resumed(2, 2)) == (1, 2, False)
    assert plan(resumed(2, 16)) == (0, 8, True)
    assert plan(resumed(2, 2), "engine.zero_stage=2") == (2, 2, True)
    assert plan(resumed(2, 2), "engine={zero_stage: 2, micro_batch: 4}") == (2, 4, False)
    assert plan(resumed(4, 2)) == (0, 8, False)
    assert plan(resumed(4, 1, **seen), temporal) == (0, 2, False)
    assert plan(resumed(2, None)) == (0, 8, False)
    assert plan(resumed(2, None, **seen), temporal) == (0, 2, False)


def test_each_value_chosen_for_auto_has_a_note(folder: Path) -> None:
    found = prepared("engine=auto")
    assert (found.layout.micro_batch, found.config.recomputed_blocks) == (8, 0)
    assert [note.split(":")[0] for note in found.notes] == [
        "engine.micro_batch auto",
        "engine.recomputed_blocks auto",
        "engine.zero_stage auto",
    ]


def test_videos_that_dali_does_not_decode_are_refused(folder: Path) -> None:
    rows = [ManifestRow(f"{i}.mp4", 0, 0, 0, 30, 25.0, 64, 48, "h264" if i < 3 else "vp9") for i in range(10)]
    train = Dataset([write_manifest(folder / "train.arrow", rows, ["a"])])
    with pytest.raises(RunError, match=r"mjpeg, vp8, vp9 on a CPU, .* 3 are .* \(3 h264\); set it to pyav"):
        check_decoder(recipe("data.decoder=dali"), train, gpu=False)
    with pytest.raises(RunError, match=r"h264, hevc on a GPU, .* 7 are .* \(7 vp9\); set it to auto"):
        check_decoder(recipe("data.decoder=dali"), train, gpu=True)
    check_decoder(recipe("data.decoder=hybrid"), train, gpu=False)
    check_decoder(recipe("data.decoder=dali", "data.bad_share=0.3"), train, gpu=False)
    change_rows(folder / "train.arrow", {0: {"label": -1}, 9: {"frames": 0}})
    bad_rows = Dataset([open_manifest(folder / "train.arrow")])  # bad videos alone stop no run
    with pytest.raises(RunError, match=r"\(2 h264\)"):
        check_decoder(recipe("data.decoder=dali"), bad_rows, gpu=False)


def test_a_rendered_data_set_of_another_size_has_a_note(folder: Path) -> None:
    length = len(prepared().train), len(prepared().val)
    for train_clips, val_clips in (length, (length[0] + 1, length[1])):
        embedded = f"data.embedded={{train_clips: {train_clips}, val_clips: {val_clips}}}"
        notes = [note for note in prepared(embedded).notes if "rendered before" in note]
        assert len(notes) == ((train_clips, val_clips) != length)
    assert f"asks for {length[0] + 1}" in notes[0] and "Delete the folder" in notes[0]
