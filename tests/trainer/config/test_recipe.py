"""Recipes: accepted and refused values, inheritance, messages, the reference page."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from models.config import UniFormerV2Config
from trainer.config.load import load_recipe
from trainer.config.reference_docs import REFERENCE_PAGE, reference
from trainer.config.schema import Recipe
from trainer.errors import RecipeError

RECIPES = Path(__file__).parents[3] / "recipes"

MINIMAL = """\
name: test
model: {preset: tiny, form: scene, frames: 8}
data: {train: train.arrow, val: val.arrow}
optimisation:
  global_batch: 32
  epochs: 10
  learning_rate: 1e-3
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    return write(tmp_path / "minimal.yaml", MINIMAL)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path, *overrides: str) -> list[str]:
    """The lines of the message that refuses a recipe."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("[!_]*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    assert load_recipe(path).name == path.stem


def test_k710_follows_table_11() -> None:
    recipe = load_recipe(RECIPES / "k710_l14.yaml")
    assert (recipe.model.preset, recipe.model.form, recipe.model.frames) == ("l14", "scene", 8)
    assert recipe.model.num_classes == 710
    optimisation = recipe.optimisation
    assert (optimisation.global_batch, optimisation.learning_rate) == (512, 1e-5)
    assert (optimisation.epochs, optimisation.warmup_epochs) == (40, 5)
    assert (optimisation.warmup_start, optimisation.end_learning_rate) == (1e-6, 1e-6)
    assert (optimisation.betas, optimisation.weight_decay) == ((0.9, 0.999), 0.05)
    assert recipe.augmentation.crop_scale == (0.08, 1.0)
    assert recipe.augmentation.color_jitter == 0.4
    assert recipe.augmentation.rand_augment == "rand-m7-n4-mstd0.5-inc1"
    assert recipe.sampling.repeats == 1


def test_order_blind_quickstart_differs_in_temporal_parts_only() -> None:
    with_time = load_recipe(RECIPES / "quickstart.yaml").flattened()
    without = load_recipe(RECIPES / "quickstart_order_blind.yaml").flattened()
    changed = {key for key in with_time.keys() | without.keys() if with_time.get(key) != without.get(key)}
    assert changed == {"name", "model.form", "model.overrides.global_layers"}
    assert without["model.overrides.global_layers"] == "[]"


def test_bases_merge_field_by_field_and_the_nearest_wins(tmp_path: Path, minimal: Path) -> None:
    (tmp_path / "shared").mkdir()
    middle = tmp_path / "shared" / "middle.yaml"
    write(middle, "base: ../minimal.yaml\nname: middle\nmodel:\n  frames: 16\naugmentation: {flip: 0}\n")
    top = write(
        tmp_path / "top.yaml", "base: shared/middle.yaml\nname: top\naugmentation: {color_jitter: 0.1}\n"
    )
    recipe = load_recipe(top)
    assert (recipe.name, recipe.model.frames, recipe.model.preset) == ("top", 16, "tiny")
    assert (recipe.augmentation.flip, recipe.augmentation.color_jitter) == (0.0, 0.1)


def test_lists_replace_and_do_not_merge(tmp_path: Path, minimal: Path) -> None:
    text = "model: {overrides: {global_layers: [3], depth: 2}}\ndata: {embedded: {train_clips: 5}}\n"
    top = write(tmp_path / "top.yaml", f"base: minimal.yaml\n{text}")
    recipe = load_recipe(top, ["model.overrides.global_layers=[]", "data.embedded.val_clips=3"])
    assert recipe.model.overrides == {"global_layers": [], "depth": 2}
    assert recipe.data.embedded is not None
    assert (recipe.data.embedded.train_clips, recipe.data.embedded.val_clips) == (5, 3)


def test_a_circle_of_bases_is_named(tmp_path: Path) -> None:
    first = write(tmp_path / "first.yaml", "base: second.yaml\n")
    second = write(tmp_path / "second.yaml", "name: x\nbase: first.yaml\n")
    assert refusal(first) == [
        f"{second}:2: base: recipes inherit in a circle: {first} -> {second} -> {first}"
    ]


def test_overrides_come_last_and_are_read_as_yaml(minimal: Path) -> None:
    recipe = load_recipe(
        minimal,
        [
            "model.frames=16",
            "augmentation.crop_scale=[0.5, 1]",
            "engine.compile=true",
            "optimisation.clip_norm=",
            "optimisation.learning_rate=3e-4",
            "model.frames=4",
        ],
    )
    assert recipe.model.frames == 4
    assert recipe.augmentation.crop_scale == (0.5, 1.0)
    assert recipe.engine.compile is True
    assert recipe.optimisation.clip_norm is None
    assert recipe.optimisation.learning_rate == 3e-4


def test_setting_one_unit_replaces_the_inherited_other(minimal: Path) -> None:
    optimisation = load_recipe(minimal, ["optimisation.steps=20"]).optimisation
    assert (optimisation.steps, optimisation.epochs) == (20, None)
    again = load_recipe(minimal, ["optimisation.steps=20", "optimisation.epochs=2"]).optimisation
    assert (again.steps, again.epochs) == (None, 2)


def test_both_units_in_one_file_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "both.yaml", MINIMAL + "  steps: 5\n")
    assert refusal(path) == [f"{path}:4: optimisation: give exactly one of `epochs` and `steps`"]


@pytest.mark.parametrize(
    ("addition", "expected"),
    [
        (
            "  learning_rat: 1\n",
            "8: optimisation.learning_rat: no such field; did you mean optimisation.learning_rate?",
        ),
        ("  frames: 3\n", "8: optimisation.frames: no such field; did you mean model.frames?"),
        ("zzz: 1\n", "8: zzz: no such field; allowed: name, seed, model, "),
        ("  zero_stage: 1\n", "8: optimisation.zero_stage: no such field; did you mean engine.zero_stage?"),
        ("engine: {zero_stage: 4}\n", "8: engine.zero_stage: found 4; allowed: one of 0, 1, 2, 3"),
        (
            "engine: {zero_stage: 3, compile: true}\n",
            "8: engine: `compile` needs `zero_stage` 0, 1 or 2: at stage 3 DeepSpeed gathers weights",
        ),
        ("engine:\n  device: gpu\n", '9: engine.device: found "gpu"; allowed: one of auto, cpu, cuda'),
        ("engine: cuda\n", '8: engine: found "cuda"; allowed: a section'),
        ("engine:\n", "8: engine: found nothing (null); allowed: a section"),
        ("seed: '3'\n", '8: seed: found "3"; allowed: an integer, at least 0'),
        ("seed: 1.5\n", "8: seed: found 1.5; allowed: an integer, at least 0"),
        ("seed: yes\n", "8: seed: found true; allowed: an integer, at least 0"),
        ("  weight_decay: .nan\n", "8: optimisation.weight_decay: found NaN; allowed: a number, at least 0"),
        (
            "  betas: [0.9, 1.0]\n",
            "8: optimisation.betas: found [0.9, 1.0]; allowed: a list of 2, each a number, ",
        ),
        (
            "  clip_norm: 0\n",
            "8: optimisation.clip_norm: found 0; allowed: a number, at least 1e-06, at most 1000000, ",
        ),
        (
            "augmentation: {crop_scale: [1, 0.5]}\n",
            "8: augmentation.crop_scale: the first of the two may not",
        ),
        (
            "augmentation: {crop_scale: [1, 1.5]}\n",
            "8: augmentation.crop_scale: a crop is at most the whole frame",
        ),
        (
            "augmentation: {rand_augment: rand-m7}\n",
            "8: augmentation.rand_augment: rand_augment 'rand-m7': only the increasing operations",
        ),
        ("augmentation: {rand_augment: 7}\n", "8: augmentation.rand_augment: found 7; allowed: text, "),
        (
            "engine:\n  micro_batch: aut\n",
            '9: engine.micro_batch: found "aut"; allowed: an integer, at least 1, at most 1048576, or auto, '
            "or null; did you mean auto?",
        ),
        (
            "engine:\n  device: cdua\n",
            '9: engine.device: found "cdua"; allowed: one of auto, cpu, cuda; did you mean cuda?',
        ),
        ("evaluation: {crops: 2}\n", "8: evaluation.crops: found 2; allowed: one of 1, 3"),
        ("  warmup_epochs: 11\n", "4: optimisation: the warm-up (11) is longer than the training (10)"),
        (
            "sampling: {repeats: 3}\n",
            " recipe: optimisation.global_batch (32) must be a multiple of sampling.repeats",
        ),
        ("seed: 1\nseed: 2\n", "9: seed: set twice, first on line 8; keep one of the two"),
        ("seed: [1\n", "9: not valid YAML: "),
        ("seed: !!python/name:os.system\n", "8: not valid YAML: could not determine a constructor"),
    ],
)
def test_a_mistake_is_named_with_file_line_and_what_is_allowed(
    tmp_path: Path, addition: str, expected: str
) -> None:
    path = write(tmp_path / "wrong.yaml", MINIMAL + addition)
    (line,) = refusal(path)
    assert line.startswith(f"{path}:{expected}")


def test_of_several_bases_the_later_wins_and_a_shared_one_comes_first(tmp_path: Path) -> None:
    shared = write(tmp_path / "_shared.yaml", MINIMAL + "  eps: 1e-7\nseed: 1\n")
    write(tmp_path / "model.yaml", "base: _shared.yaml\nseed: 2\nname: model\n")
    write(tmp_path / "data.yaml", "base: _shared.yaml\ndata: {val: other.arrow}\n")
    write(tmp_path / "last.yaml", "data: {val: last.arrow}\n")
    both = load_recipe(write(tmp_path / "both.yaml", "base: [model.yaml, data.yaml]\nname: both\n"))
    # _shared.yaml is not applied again after model.yaml, or the seed would be 1.
    assert (both.seed, both.optimisation.eps, str(both.data.val)) == (2, 1e-7, "other.arrow")
    assert both.tracking.experiment == "model"
    three = load_recipe(write(tmp_path / "three.yaml", "base: [both.yaml, last.yaml]\nname: three\n"))
    assert str(three.data.val) == "last.arrow"
    for wrong, found in (("[model.yaml, 3]", "found 3"), ("{}", "found {}"), ("['']", 'found ""')):
        (line,) = refusal(write(tmp_path / "wrong.yaml", f"name: wrong\nbase: {wrong}\n"))
        assert f"wrong.yaml:2: base: {found}" in line
    write(shared, MINIMAL + "base: [both.yaml]\n")
    (line,) = refusal(tmp_path / "both.yaml")
    assert "in a circle" in line


def test_the_file_of_the_chain_that_is_wrong_is_named(tmp_path: Path) -> None:
    base = write(tmp_path / "base.yaml", MINIMAL + "  eps: 0\n")
    top = write(tmp_path / "top.yaml", "base: base.yaml\nseed: -1\n")
    assert set(refusal(top, "run.keep_last=0")) == {
        f"{base}:8: optimisation.eps: found 0; allowed: a number, at least 1e-20, at most 1",
        f"{top}:2: seed: found -1; allowed: an integer, at least 0, below 9223372036854775808",
        "--set run.keep_last=0: run.keep_last: found 0; allowed: an integer, at least 1, at most 1000000",
    }


def test_rand_augment_accepts_policies_of_the_pipeline(minimal: Path) -> None:
    for policy in ("rand-m7-n4-mstd0.5-inc1", "rand-m9-n2-inc1-p0.3"):
        recipe = load_recipe(minimal, [f"augmentation.rand_augment={policy}"])
        assert recipe.augmentation.rand_augment == policy


def with_train(text: str) -> str:
    return MINIMAL.replace("train: train.arrow", f"train: {text}")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a.arrow", [("a.arrow", None)]),
        ("[a.arrow]", [("a.arrow", None)]),
        ("[a.arrow, {manifest: b.arrow}]", [("a.arrow", None), ("b.arrow", None)]),
        ("[{manifest: a.arrow, ratio: 3}, {ratio: 0.5, manifest: b}]", [("a.arrow", 3.0), ("b", 0.5)]),
    ],
)
def test_training_manifests_with_and_without_ratios(
    tmp_path: Path, text: str, parts: list[tuple[str, float | None]]
) -> None:
    recipe = load_recipe(write(tmp_path / "mixed.yaml", with_train(text)))
    assert [(str(part.manifest), part.ratio) for part in recipe.data.train_manifests] == parts
    assert isinstance(recipe.data.train, Path) == (text == "a.arrow")
    assert load_recipe(write(tmp_path / "resolved.yaml", recipe.to_yaml())) == recipe
    assert isinstance(recipe.flattened()["data.train"], str)
    alone = load_recipe(tmp_path / "mixed.yaml", ["data.train=c.arrow"])
    assert alone.data.train == Path("c.arrow")
    several = load_recipe(tmp_path / "mixed.yaml", ["data.train=[c.arrow, d.arrow]"])
    assert [part.manifest.name for part in several.data.train_manifests] == ["c.arrow", "d.arrow"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3", "found 3; allowed: a path, or a list of {manifest, ratio}"),
        ("{manifest: a}", 'found {"manifest": "a"}; allowed: a path, or a list of {manifest, ratio}'),
        ("[]", "the list is empty; name at least one manifest"),
        ("[a, 3]", "entry 2: found 3; allowed: a path, or {manifest: PATH, ratio: NUMBER}"),
        ("[a, {manifest: b, ratoi: 1}]", "entry 2: ratoi: no such field; did you mean ratio?"),
        ("[{manifest: b, x: 1}]", "entry 1: x: no such field; allowed: manifest, ratio"),
        ("[{ratio: 1}]", 'entry 1: manifest: missing in {"ratio": 1}; allowed: a path'),
        ("[{manifest: 4}]", "entry 1: manifest: found 4; allowed: a path"),
        ("[{manifest: a, ratio: 0}]", "entry 1: ratio: found 0; allowed: a number, at least 1e-12"),
        ("[{manifest: a, ratio: yes}]", "entry 1: ratio: found true; allowed: a number, at least 1e-12"),
        ("[{manifest: a, ratio: .inf}]", "entry 1: ratio: found Infinity; allowed: a number, at least 1e-12"),
        (
            "[{manifest: a, ratio: 1}, b]",
            "entry 2 has no ratio, others have one; give one to all, or to none",
        ),
    ],
)
def test_a_wrong_list_of_manifests_is_refused_by_entry(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path / "wrong.yaml", with_train(text))
    (line,) = refusal(path)
    assert line.startswith(f"{path}:3: data.train: {expected}")


def test_the_embedded_data_set_is_not_mixed_with_others(tmp_path: Path, minimal: Path) -> None:
    text = "[a.arrow], embedded: {train_clips: 8, val_clips: 8}"
    (line,) = refusal(write(tmp_path / "mixed.yaml", with_train(text)))
    assert "data: `embedded` renders a single `train` manifest" in line


def test_one_line_per_field_also_where_several_types_are_allowed(minimal: Path) -> None:
    assert refusal(minimal, "data.workers=many") == [
        '--set data.workers=many: data.workers: found "many"; allowed: an integer, at least 1, at most 1024, '
        "or auto"
    ]


def test_missing_fields_are_named(tmp_path: Path) -> None:
    path = write(
        tmp_path / "short.yaml", MINIMAL.replace("  global_batch: 32\n", "").replace("name: test", "")
    )
    lines = refusal(path)
    assert any(
        line.startswith(f"{path}:4: optimisation.global_batch: missing; allowed: an integer, at least 1")
        for line in lines
    )
    assert any(line.startswith(f"{path}: name: missing; ") for line in lines)


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path, minimal: Path) -> None:
    (line,) = refusal(tmp_path / "minimla.yaml")
    assert line.endswith(f"No such file or directory; did you mean {minimal}?")
    top = write(tmp_path / "top.yaml", "name: x\nbase: minmal.yaml\n")
    (line,) = refusal(top)
    assert line.startswith(f"{top}:2: cannot read the recipe {tmp_path / 'minmal.yaml'}: No such file")
    assert line.endswith("; did you mean minimal.yaml?")


def test_a_missing_base_suggests_what_to_write_there(
    tmp_path: Path, minimal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("shared", "own"):
        (tmp_path / folder).mkdir()
    write(tmp_path / "shared/_scene.yaml", "seed: 3\n")
    write(tmp_path / "own/other.yaml", "seed: 3\n")
    top = tmp_path / "own/scene.yaml"
    for base, hint in (
        ("../shared/_scenes.yaml", "; did you mean ../shared/_scene.yaml?"),
        ("shared/_scene.yaml", "names it: did you mean ../shared/_scene.yaml?"),
        ("own/other.yaml", "names it: did you mean other.yaml?"),
        ("nowhere/at-all.yaml", "; a base is relative to the file that names it"),
        ("scene.yml", "No such file or directory"),  # nearly its own name: that would be a circle
    ):
        write(top, f"name: x\nbase: {base}\n")
        (line,) = refusal(top)
        assert line.endswith(hint), line


@pytest.mark.parametrize("name", ["", "a b", "../up", "a/b", "-a", "é"])
def test_the_characters_of_a_name_are_listed_and_no_pattern(minimal: Path, name: str) -> None:
    (line,) = refusal(minimal, f'name="{name}"')
    assert "letters A-Z and a-z, digits, dots, underscores and hyphens" in line and "^" not in line


@pytest.mark.parametrize("text", ["", "- a\n", "3\n"])
def test_a_recipe_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    (line,) = refusal(write(tmp_path / "odd.yaml", text))
    assert line.endswith("a recipe is a mapping of sections")


@pytest.mark.parametrize("override", ["seed", "=3", "model..frames=3"])
def test_a_malformed_override_is_refused(minimal: Path, override: str) -> None:
    assert refusal(minimal, override) == [f"--set {override}: an override has the form section.field=value"]


def test_a_resolved_recipe_loads_again_and_is_equal(tmp_path: Path) -> None:
    for path in RECIPES.glob("[!_]*.yaml"):
        # Names that YAML would take for a number or a date.
        for name in (path.stem, "1e-3", "2024-01-01", "null"):
            recipe = load_recipe(path, [f"name='{name}'", "optimisation.learning_rate=1.2345678901234e-7"])
            assert load_recipe(write(tmp_path / "resolved.yaml", recipe.to_yaml())) == recipe


def test_flattened_has_every_leaf_as_a_scalar(minimal: Path) -> None:
    flat = load_recipe(minimal).flattened()
    assert flat["optimisation.betas"] == "[0.9, 0.999]"
    assert flat["data.train"] == "train.arrow"
    assert flat["model.num_classes"] is None


def test_a_recipe_cannot_be_changed(minimal: Path) -> None:
    recipe = load_recipe(minimal)
    with pytest.raises(ValueError, match="frozen"):
        recipe.optimisation.learning_rate = 1.0  # type: ignore[misc]


def test_lengths_in_epochs_become_steps(minimal: Path) -> None:
    optimisation = load_recipe(minimal, ["optimisation.warmup_epochs=0.5"]).optimisation
    assert (optimisation.total_steps(7), optimisation.total_warmup_steps(7)) == (70, 4)
    in_steps = load_recipe(minimal, ["optimisation.steps=3", "optimisation.warmup_epochs=1"]).optimisation
    assert (in_steps.total_steps(7), in_steps.total_warmup_steps(7)) == (3, 3)
    evaluation = load_recipe(minimal, ["evaluation.every_epochs=0.01"]).evaluation
    assert evaluation.interval(7) == 1
    assert load_recipe(minimal).evaluation.interval(7) is None


def test_every_field_has_a_sentence() -> None:
    sections = [(Recipe, "")]
    for section, prefix in sections:
        for name, field in section.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, Recipe.__base__):
                sections.append((inner, f"{name}."))
                assert inner.__doc__, name
            else:
                assert field.description, prefix + name
                assert field.description.endswith("."), prefix + name


def test_the_reference_page_is_up_to_date() -> None:
    assert REFERENCE_PAGE.read_text(encoding="utf-8") == reference(), (
        "run: python -m trainer.config.reference_docs"
    )


def test_the_reference_page_lists_the_fields_of_the_model_with_sentence_and_values() -> None:
    rows = {
        line.split("|")[1].strip(): line for line in reference().splitlines() if line.startswith("| `model.")
    }
    for field in dataclasses.fields(UniFormerV2Config):
        if field.name not in ("frames", "num_classes", "recomputed_blocks"):
            allowed, _, meaning = rows[f"`model.overrides.{field.name}`"].split(" | ")[1:]
            assert allowed and meaning.endswith(". |")


def test_a_field_of_the_model_outside_the_overrides_is_named(minimal: Path) -> None:
    with pytest.raises(RecipeError, match=r"did you mean model\.overrides\.local_mhra"):
        load_recipe(minimal, ["model.local_mhra=1"])


def test_engine_auto_is_kept_when_a_later_layer_sets_another_field(tmp_path: Path) -> None:
    shutil.copytree(RECIPES, tmp_path / "recipes")
    base = tmp_path / "recipes" / "auto.yaml"
    base.write_text("base: own_videos.yaml\nname: auto\nengine: auto\n", encoding="utf-8")
    engine = load_recipe(base, ["engine.precision=fp32"]).engine
    assert (engine.zero_stage, engine.micro_batch, engine.recomputed_blocks) == ("auto", "auto", "auto")
    assert engine.precision == "fp32"


def test_the_old_name_of_the_weights_names_the_new_one_and_its_null_is_nothing(minimal: Path) -> None:
    (line,) = refusal(minimal, "model.image_weights=clip.safetensors")
    assert "model.image_weights: no such field; it is model.weights now" in line
    # As earlier versions saved it in run folders.
    assert load_recipe(minimal, ["model.image_weights=null"]) == load_recipe(minimal)


def test_a_recipe_and_its_variants_share_an_experiment(minimal: Path, tmp_path: Path) -> None:
    write(tmp_path / "_shared.yaml", MINIMAL)
    first = write(tmp_path / "first.yaml", "base: _shared.yaml\nname: one\n")
    variant = write(tmp_path / "variant.yaml", "base: first.yaml\nname: two\n")
    experiments = [load_recipe(path).tracking.experiment for path in (minimal, first, variant)]
    assert experiments == ["test", "one", "one"]
    assert load_recipe(variant, ["tracking.experiment=mine"]).tracking.experiment == "mine"
    # A run's own recipe.yaml has it, whatever its file is called.
    own = write(tmp_path / "recipe.yaml", load_recipe(variant).to_yaml())
    assert load_recipe(own).tracking.experiment == "one"


@pytest.mark.parametrize("name", ["motion", "motion@best", "my model 2@v-next"])
def test_names_of_registered_models(minimal: Path, name: str) -> None:
    assert load_recipe(minimal, [f"tracking.register_as={name}"]).tracking.register_as == name


@pytest.mark.parametrize("name", ["a/b", "it's", "a@", "@best", "motion@latest", "motion@v3"])
def test_names_that_mlflow_s_registry_refuses(minimal: Path, name: str) -> None:
    (line,) = refusal(minimal, f'tracking.register_as="{name}"')
    assert "tracking.register_as" in line


def test_an_unknown_field_of_the_model_is_refused_with_the_nearest(minimal: Path) -> None:
    with pytest.raises(RecipeError, match=r"model\.overrides\.local_mhro: .*did you mean 'local_mhra'"):
        load_recipe(minimal, ["model.overrides.local_mhro=1"])
