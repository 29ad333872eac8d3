"""`model.weights`: kinds of files, which tensors are loaded, and the report."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models import UniFormerV2, UniFormerV2Config, build_config
from models.weights.released import to_released
from pipelines.dataset import kinetics710
from trainer.checkpoint.weights import save_weights
from trainer.errors import RunError
from trainer.setup.starting_weights import plan_starting_weights

NAMES = ("move_left", "move_right", "spin_left", "spin_right", "grow", "shrink")
COLOURS = {"mean": [0.45, 0.45, 0.45], "std": [0.225, 0.225, 0.225]}


def config(classes: int = 6, form: str = "scene", **overrides) -> UniFormerV2Config:
    size = {"resolution": 32, "width": 64, "depth": 2, "heads": 1, "global_heads": 1, "global_layers": (1,)}
    fields = {"frames": 4, **size, **overrides}
    return build_config("tiny", form=form, num_classes=classes, **fields)


def built(seed: int, described: UniFormerV2Config) -> UniFormerV2:
    """A model with every value random, also those that are initialised to zero."""
    torch.manual_seed(seed)
    model = UniFormerV2(described)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            torch.nn.init.normal_(tensor, std=0.1).abs_()
    return model.eval()


@pytest.fixture
def source() -> UniFormerV2:
    return built(1, config())


@pytest.fixture
def export(source: UniFormerV2, tmp_path: Path) -> Path:
    return exported(tmp_path / "weights.safetensors", source)


def exported(path: Path, model: UniFormerV2, names=NAMES) -> Path:
    description = {
        "model": dataclasses.asdict(model.config),
        "class_names": list(names),
        "preprocessing": COLOURS,
        "recipe": {},
    }
    save_weights(path, model.state_dict(), description)
    return path


def started(path: Path, described: UniFormerV2Config, names=NAMES) -> tuple[UniFormerV2, str]:
    """A model with the weights of the file, and the report."""
    plan = plan_starting_weights(path, described, names, COLOURS)
    assert len(plan.report) <= 15
    model = built(2, described)
    assert sorted((*plan.names["loaded"], *plan.names["new"])) == sorted(model.state_dict())
    assert set(plan.names["adapted"]) <= set(plan.names["loaded"])
    plan.load(model)
    return model, "\n".join(plan.report)


def test_the_same_model_and_classes_give_equal_scores(export: Path, source: UniFormerV2) -> None:
    model, report = started(export, config())
    clips = torch.randn(2, 3, 4, 32, 32)
    assert torch.equal(model(clips), source(clips))
    assert "all 6 rows kept" in report and "initialisation" not in report


def test_rows_are_copied_by_class_name_and_the_others_are_new(export: Path, source: UniFormerV2) -> None:
    names = ("SPIN RIGHT", "wave", "move_left")
    model, report = started(export, config(3), names)
    untouched = built(2, config(3))
    for own, other in ((0, 3), (2, 0)):
        assert torch.equal(model.head.weight[own], source.head.weight[other])
        assert torch.equal(model.head.bias[own], source.head.bias[other])
    assert torch.equal(model.head.weight[1], untouched.head.weight[1])
    assert torch.equal(model.blocks[0].mlp.expand.weight, source.blocks[0].mlp.expand.weight)
    assert "2 of 3 rows copied by class name, of the file's 6; new: 1 (wave)" in report
    model, report = started(export, config(2), ("cat", "dog"))
    assert torch.equal(model.head.weight, built(2, config(2)).head.weight)
    assert "head: new, 2 rows" in report and "cat" in report and "move_left" in report
    assert "mere numbers" in started(export, config(2), ("0", "1"))[1]


def test_resolution_and_number_of_frames_may_differ(export: Path, source: UniFormerV2) -> None:
    larger = config(resolution=48, frames=8)
    model, report = started(export, larger)
    assert torch.equal(model.position_embedding[0], source.position_embedding[0])
    assert f"from {source.config.grid}x{source.config.grid} to {larger.grid}x{larger.grid}" in report
    assert "frames: 4 in the file, 8 here" in report


@pytest.mark.parametrize(
    ("fields", "new"),
    [
        ({"temporal_module": "temporal_mhsa"}, ("temporal_position", "blocks.temporal")),
        ({"temporal_module": "st_adapter"}, ("blocks.temporal (12)",)),
        (
            {"local_mhra": 1, "local_dpe": True, "local_layers": (1,)},
            ("blocks.local_dpe (2)", "blocks.local_1 (11)"),
        ),
        ({"temporal_module": "temporal_transformer"}, ("temporal_position", "temporal_transformer.layers")),
        ({"global_queries": 4}, ("fusion.query",)),
    ],
    ids=str,
)
def test_new_temporal_parts_keep_their_initialisation_and_are_reported(
    fields: dict, new: tuple[str, ...], export: Path, source: UniFormerV2
) -> None:
    model, report = started(export, config(**fields))
    assert "keep their initialisation" in report and all(name in report for name in new)
    assert torch.equal(model.blocks[1].mlp.expand.weight, source.blocks[1].mlp.expand.weight)
    untouched = built(2, config(**fields)).state_dict()
    for name in model.state_dict().keys() - source.state_dict().keys():
        assert torch.equal(model.state_dict()[name], untouched[name])


def test_parts_that_the_model_does_not_have_are_left_out(tmp_path: Path) -> None:
    there = built(1, config(temporal_module="temporal_mhsa", global_layers=()))
    path = exported(tmp_path / "mhsa.safetensors", there)
    _, report = started(path, config(output="video_token"))
    left_out = next(line for line in report.splitlines() if line.startswith("left out"))
    assert "temporal_position (1)" in left_out and "blocks.temporal (12)" in left_out
    assert "temporal_module: temporal_mhsa in the file, none here" in report
    assert "output: auto in the file, video_token here" in report
    _, report = started(
        exported(tmp_path / "global.safetensors", built(1, config())), config(global_dpe=False)
    )
    assert "left out: fusion.blocks (2)" in report


def test_temporal_positions_are_interpolated_to_another_number_of_frames(tmp_path: Path) -> None:
    there = built(1, config(temporal_module="joint_mhsa", global_layers=()))
    path = exported(tmp_path / "joint.safetensors", there)
    model, report = started(path, config(temporal_module="joint_mhsa", global_layers=(), frames=8))
    old, given = there.temporal_position, model.temporal_position
    assert torch.equal(given[0], old[0]) and torch.equal(given[-1], old[-1])
    torch.testing.assert_close(given[1], 0.75 * old[0] + 0.25 * old[1])
    assert "temporal position: interpolated" in report and "no weight depends" not in report


def test_between_the_forms_the_common_tensors_are_loaded(tmp_path: Path, export: Path, source) -> None:
    temporal = config(form="temporal", temporal_downsample=True, global_layers=(0, 1))
    model, report = started(export, temporal)
    assert "blocks.local_1" in report and "fusion.blocks" in report and "patch embedding" in report
    # The global block of layer 1, which is the file's first.
    assert torch.equal(model.fusion.blocks[1].mlp.expand.weight, source.fusion.blocks[0].mlp.expand.weight)
    still = torch.randn(1, 3, 1, 32, 32).expand(-1, -1, 4, -1, -1)
    inner = model.patch_embedding(still)[:, 0]  # the first frame sees padding before it
    torch.testing.assert_close(model.patch_embedding(still)[:, 1], source.patch_embedding(still)[:, 1])
    assert inner.shape == source.patch_embedding(still)[:, 0].shape
    back = exported(tmp_path / "temporal.safetensors", model)
    again, report = started(back, config())
    assert "left out: blocks.local_1" in report
    torch.testing.assert_close(again.patch_embedding.weight, source.patch_embedding.weight)


def test_relative_positions_are_interpolated_and_an_inflation_is_chosen(tmp_path: Path) -> None:
    source = built(1, config(backbone="beit"))
    path = exported(tmp_path / "beit.safetensors", source)
    larger = config(backbone="beit", resolution=48, temporal_downsample=True)
    plan = plan_starting_weights(path, larger, NAMES, COLOURS, "mean")
    assert "relative positions: interpolated to 6x6" in "\n".join(plan.report)
    model = built(2, larger)
    plan.load(model)
    assert torch.equal(
        model.blocks[1].attention.positions.table[-3:], source.blocks[1].attention.positions.table[-3:]
    )
    image, inflated = source.patch_embedding.weight, model.patch_embedding.weight
    torch.testing.assert_close(inflated, image.expand(-1, -1, 3, -1, -1) / 3)
    with pytest.raises(RunError, match="frame_feature is patch_mean in the file"):
        plan_starting_weights(path, config(), NAMES, COLOURS)


def test_another_width_or_depth_is_refused_with_both_sides_and_ten_tensors(export: Path) -> None:
    for other, token in (
        (config(width=128, heads=2), "width 128"),
        (config(depth=3, global_layers=(2,)), "3 blocks"),
        (config(heads=2), "heads is 1 in the file, 2 in the model"),
        (config(activation="gelu"), "activation is quick_gelu in the file"),
    ):
        with pytest.raises(RunError, match=r"model\.weights.*does not fit") as refused:
            plan_starting_weights(export, other, NAMES, COLOURS)
        text = str(refused.value)
        assert token in text and "in the file: width 64, 2 blocks" in text
        assert len(text.splitlines()) <= 13


@pytest.mark.parametrize("ported", [False, True])
def test_released_checkpoints_are_detected_by_their_tensor_names(tmp_path: Path, ported: bool) -> None:
    source = built(1, config(400))
    names = {f"backbone.{name}": tensor for name, tensor in to_released(source).items()}
    if ported:
        renamed = {"backbone.transformer.proj.0.": "backbone.transformer.norm."}
        renamed["backbone.transformer.proj.2."] = "cls_head.fc_cls."
        for old, new in renamed.items():
            names = {name.replace(old, new): tensor for name, tensor in names.items()}
    torch.save({"model_state": names}, tmp_path / "released.pyth")
    wanted = ("Abseiling", "tying necktie", "my own")
    model, report = started(tmp_path / "released.pyth", config(3), wanted)
    order = kinetics710.class_names("k400" if ported else "k400_released")
    assert torch.equal(model.head.weight[0], source.head.weight[order.index("abseiling")])
    assert torch.equal(model.head.weight[1], source.head.weight[order.index("tying tie")])
    assert torch.equal(model.blocks[1].attention.qkv.weight, source.blocks[1].attention.qkv.weight)
    assert "2 of 3 rows" in report and ("mmaction2" in report) == ported


def test_the_authors_710_classes(tmp_path: Path) -> None:
    """Rows 0 to 399 are known by name; a manifest in their order of Kinetics-600 identifies the others."""
    source = built(1, config(710))
    path = tmp_path / "k710.safetensors"
    save_file(to_released(source), path)
    model, report = started(path, config(2), ("riding a bike", "luge"))
    assert torch.equal(model.head.weight[0], source.head.weight[0])
    assert "1 of 2 rows" in report and "0 to 399" in report
    released, rows = kinetics710.released_names(), kinetics710.released_rows()[600]
    names = tuple(released[row] or f"unknown {row}" for row in rows)
    model, report = started(path, config(600), names)
    assert torch.equal(model.head.weight, source.head.weight[list(rows)])
    assert "600 rows copied" in report


def test_an_unknown_order_of_classes_gives_a_new_head(tmp_path: Path) -> None:
    source = built(1, config(6, form="temporal", temporal_downsample=True))
    save_file(to_released(source), tmp_path / "ss.safetensors")
    same = config(6, form="temporal", temporal_downsample=True)
    model, report = started(tmp_path / "ss.safetensors", same)
    assert "head: new, 6 rows: the file does not name its 6 classes" in report and "BGR" in report
    assert torch.equal(model.patch_embedding.weight, source.patch_embedding.weight.flip(1))
    assert torch.equal(model.head.weight, built(2, same).head.weight)


def test_a_refusal_says_which_file_to_name(export: Path, tmp_path: Path) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises(RunError, match=r"model\.weights") as refused:
            plan_starting_weights(path, config(), NAMES, COLOURS)
        return str(refused.value)

    assert str(export) in refusal(tmp_path)  # a run's folder
    export.unlink()
    (tmp_path / "checkpoints").mkdir()
    assert "uniformerv2 export" in refusal(tmp_path)
    assert "does not exist" in refusal(export)
    save_file({"weight/blocks.0.norm_1.weight": torch.zeros(2)}, tmp_path / "shard-00000.safetensors")
    assert "uniformerv2 export" in refusal(tmp_path / "shard-00000.safetensors")
