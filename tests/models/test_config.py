"""Presets, overrides, and messages that name the field and the allowed values."""

import dataclasses

import pytest

from models import FORMS, PRESETS, ModelError, UniFormerV2Config, build_config
from models.cost import parameter_count


def build(preset="tiny", **fields):
    return build_config(preset, **{"form": "scene", "frames": 8, "num_classes": 10, **fields})


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("form", FORMS)
def test_every_preset_exists_in_both_forms(preset, form):
    config = build(preset, form=form)
    is_temporal = form == "temporal"
    assert config.local_mhra == (2 if is_temporal else 0)
    assert config.inner_frames == (4 if is_temporal else 8)


@pytest.mark.parametrize(
    ("preset", "form", "first"),
    [("b16", "scene", 8), ("b16", "temporal", 4), ("l14", "scene", 20), ("l14_336", "temporal", 8)],
)
def test_global_blocks_follow_the_layers_of_the_paper(preset, form, first):
    config = build(preset, form=form)
    assert config.global_layers == tuple(range(first, config.depth))


def test_released_regularisation_belongs_to_the_form():
    scene, temporal = build("b16"), build("b16", form="temporal")
    assert (scene.drop_path, scene.global_drop_path) == (0.0, 0.0)
    assert (temporal.drop_path, temporal.global_drop_path) == (0.2, 0.4)
    assert (scene.head_dropout, scene.global_mlp_dropout) == (0.5, 0.5)


@pytest.mark.parametrize("form", FORMS)
def test_tiny_is_small_and_has_no_dropout(form):
    config = build(form=form)
    assert 300_000 < parameter_count(config) < 800_000
    assert (
        config.drop_path == config.global_drop_path == config.head_dropout == config.global_mlp_dropout == 0
    )


def test_overrides_of_depth_and_heads_change_their_dependent_defaults():
    config = build("b16", depth=6, heads=8)
    assert config.global_layers == (2, 3, 4, 5)
    assert config.global_heads == 8


def test_lists_of_recipes_become_tuples():
    assert build(global_layers=[1, 3]).global_layers == (1, 3)


def test_the_config_survives_a_round_trip_through_a_dict():
    config = build(form="temporal")
    fields = dataclasses.asdict(config) | {"global_layers": list(config.global_layers)}
    assert UniFormerV2Config(**fields) == config


def test_overrides_win_over_the_backbone():
    config = build(backbone="beit", layer_scale=1e-5)
    assert (config.layer_scale, config.relative_positions, config.activation) == (1e-5, True, "gelu")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preset": "b61"}, "unknown preset 'b61', did you mean 'b16'?"),
        ({"form": "temporel"}, "unknown form 'temporel', did you mean 'temporal'?"),
        ({"drop_pth": 0.1}, "unknown model field 'drop_pth', did you mean 'drop_path'?"),
        ({"resolution": 60}, "resolution is 60, allowed is: a multiple of patch_size 8"),
        ({"heads": 5}, "heads is 5, allowed is: a divisor of width 96"),
        ({"global_heads": 7}, "global_heads is 7"),
        ({"depth": 0}, "depth is 0, allowed is: a whole number of at least 1"),
        ({"frames": 8.0}, "frames is 8.0"),
        ({"form": "temporal", "frames": 7}, "frames is 7, allowed is: even with temporal_downsample"),
        ({"local_mhra": 3}, "local_mhra is 3, allowed is: 0, 1 or 2"),
        ({"local_reduction": 0.5}, "local_reduction is 0.5"),
        ({"global_layers": (3, 2)}, "global_layers is \\(3, 2\\), allowed is: ascending"),
        ({"global_layers": (4,)}, "from 0 to 3"),
        ({"global_layers": 3}, "global_layers is 3, allowed is: a list"),
        ({"drop_path": 1.0}, "drop_path is 1.0, allowed is: at least 0 and below 1"),
        ({"fusion": "serial"}, "fusion is 'serial', allowed is: one of sequential"),
        ({"activation": "relu"}, "activation is 'relu'"),
        ({"ln_pre": 1}, "ln_pre is 1, allowed is: true or false"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0"),
        ({"mlp_ratio": 0}, "mlp_ratio is 0"),
        ({"global_mlp_ratio": 65}, "global_mlp_ratio is 65"),
        ({"global_mlp_ratio": -1}, "global_mlp_ratio is -1, allowed is: at least 0 and at most 64, or null"),
        ({"global_mlp_ratio": 0.01}, "global_mlp_ratio is 0.01, allowed is: 0, or at least 1 / width 96"),
        ({"layer_scale": -1.0}, "layer_scale is -1.0"),
        ({"frame_feature": "mean"}, "frame_feature is 'mean', allowed is: one of class_token, patch_mean"),
        ({"backbone": "biet"}, "unknown backbone 'biet', did you mean 'beit'?"),
        ({"recomputed_blocks": 5}, "recomputed_blocks is 5, allowed is: between 0 and depth 4"),
        ({"frozen_backbone": True, "global_layers": ()}, "global_layers is .*frozen_backbone"),
        ({"frozen_backbone": True, "local_mhra": 1}, "local_mhra is 1, allowed is: 0 with frozen_backbone"),
    ],
)
def test_a_wrong_value_is_refused_with_its_field_and_the_allowed_values(fields, message):
    with pytest.raises(ModelError, match=message):
        build(**fields)
