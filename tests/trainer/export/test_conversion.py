"""`convert.py`: this program's naming, the authors' and mmaction2's, and heads of Kinetics-710."""

import csv
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from models import UniFormerV2, UniFormerV2Config, build_config
from models.weights.files import StoredWeights, read_state
from models.weights.released import describe_released, to_file
from pipelines.dataset import kinetics710
from tests.launch.scripts import run_script
from trainer.checkpoint.weights import load_weights
from trainer.errors import RunError
from trainer.export.conversion import convert

EXPERIMENTS = Path(__file__).parents[2] / "recipes" / "released_experiments.tsv"
_REMOVED = {"drop_path": 0.0, "global_drop_path": 0.0}
SMALL: dict[str, Any] = {"resolution": 16, "patch_size": 8, "width": 64, "depth": 2, "heads": 1}


def released_configs(**size: Any) -> dict[str, UniFormerV2Config]:
    """The different models among the 49 released ones, by their names. size: overrides of the preset's."""
    found: dict[str, UniFormerV2Config] = {}
    with EXPERIMENTS.open(encoding="utf-8") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            is_temporal = row["temporal_downsample"] == "True"
            fields = {"frozen_backbone": row["frozen_backbone"] == "True", **_REMOVED, **size}
            config = build_config(
                row["backbone"],
                form="temporal" if is_temporal else "scene",
                frames=16,
                num_classes=int(row["classes"]),
                **fields,
            )
            if config not in found.values():
                found[row["experiment"]] = config
    return found


def built(config: UniFormerV2Config) -> UniFormerV2:
    """A model of which every value is different from its initial one."""
    torch.manual_seed(0)
    model = UniFormerV2(config)
    for tensor in model.state_dict().values():
        tensor += torch.randint(1, 9, ()) if not tensor.is_floating_point() else torch.rand_like(tensor)
    return model.eval()


def small(classes: int = 710, **fields: Any) -> UniFormerV2:
    config = {**SMALL, "form": "scene", "global_layers": (1,), **fields}
    return built(build_config("b16", frames=4, num_classes=classes, **config))


def image_tower_state() -> dict[str, torch.Tensor]:
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 64}
    text = {"context_length": 4, "vocab_size": 8, "width": 16, "heads": 2, "layers": 1}
    return open_clip.CLIP(16, vision, text).visual.state_dict()


@pytest.mark.parametrize("name", released_configs())
def test_the_names_and_shapes_of_each_released_model_give_its_config(name: str) -> None:
    config = released_configs()[name]
    with torch.device("meta"):
        model = UniFormerV2(config)
    for port in (False, True):
        described = describe_released(StoredWeights(name, to_file(model, port=port), lambda _: {}), frames=16)
        assert (described.config, described.is_port) == (config, port)


NARROW = {"width": 64, "heads": 1, "resolution": 28, "patch_size": 14}
KINDS = {  # without those that differ in the number of classes only
    (config.depth, config.temporal_downsample, config.frozen_backbone): (name, config)
    for name, config in released_configs(**NARROW).items()
}


@pytest.mark.parametrize(("name", "config"), KINDS.values())
def test_each_kind_of_released_model_survives_a_tour_of_all_namings(
    name: str, config: UniFormerV2Config, tmp_path: Path
) -> None:
    original = to_file(built(config), port=False)
    torch.save({"model_state": original}, tmp_path / "released.pyth")
    convert(tmp_path / "released.pyth", tmp_path / "port.pth", "mmaction2")
    convert(tmp_path / "port.pth", tmp_path / "own.safetensors", "own", frames=16, labels="released")
    convert(tmp_path / "own.safetensors", tmp_path / "back.pyth", "released")
    ported = torch.load(tmp_path / "port.pth", weights_only=True)["state_dict"]
    assert {"backbone.transformer.norm.weight", "cls_head.fc_cls.weight"} <= ported.keys()
    back = torch.load(tmp_path / "back.pyth", weights_only=True)["model_state"]
    assert back.keys() == original.keys()
    for key, tensor in original.items():
        assert back[key].dtype == tensor.dtype and torch.equal(back[key], tensor), key
    own = load_weights(tmp_path / "own.safetensors").model
    assert own.config == config
    # Models of Something-Something read BGR frames there, and RGB frames here.
    there = original["backbone.conv1.weight"]
    expected = there.flip(1) if config.temporal_downsample else there
    assert torch.equal(own.patch_embedding.weight, expected)


def test_the_command_says_what_it_did(tmp_path: Path) -> None:
    model = small(400, form="temporal")
    save_file(to_file(model, port=False), tmp_path / "ssv2.safetensors")
    out = tmp_path / "own.safetensors"
    result = run_script(
        "convert.py", tmp_path / "ssv2.safetensors", "--to", "own", "--frames", 4, "--out", out
    )
    assert result.returncode == 0, result.stderr
    assert "trained on BGR frames and this program reads RGB" in result.stdout
    assert "Kinetics-400 in the authors' order" in result.stdout
    assert load_weights(out).class_names == kinetics710.class_names("k400_released")
    torch.testing.assert_close(load_weights(out).model.state_dict(), model.state_dict(), atol=0, rtol=0)
    back = convert(out, tmp_path / "back.safetensors", "released")
    assert any("reversed" in line for line in back)
    original = load_file(tmp_path / "ssv2.safetensors")
    torch.testing.assert_close(load_file(tmp_path / "back.safetensors"), original, atol=0, rtol=0)


@pytest.mark.parametrize("head", ["k400", "k600", "k700"])
@pytest.mark.parametrize("port", [False, True])
def test_a_head_of_kinetics_710_gives_the_rows_of_a_smaller_one(
    head: Any, port: bool, tmp_path: Path
) -> None:
    model, size = small(), int(head[1:])
    torch.save({"state_dict": to_file(model, port=port)}, tmp_path / "k710.pth")
    convert(tmp_path / "k710.pth", tmp_path / "own.safetensors", "own", frames=4, head=head)
    found = load_weights(tmp_path / "own.safetensors")
    if port:
        rows: Any = kinetics710.union_rows(head)
        assert found.class_names == kinetics710.class_names(head)
    else:
        rows = kinetics710.released_rows().get(size, range(400))
        known = kinetics710.released_names()
        assert found.class_names == tuple(known[row] or f"row {row}" for row in rows)
    assert torch.equal(found.model.head.weight, model.head.weight[list(rows)])
    assert torch.equal(found.model.head.bias, model.head.bias[list(rows)])
    assert found.model.config.num_classes == size == len(rows)
    given = tuple(f"class {number}" for number in range(710))
    convert(
        tmp_path / "k710.pth", tmp_path / "own.safetensors", "own", frames=4, head=head, class_names=given
    )
    own = load_weights(tmp_path / "own.safetensors")
    assert own.class_names == tuple(f"class {row}" for row in rows)
    # The other way: first to this program's file, whose class names identify the rows.
    convert(tmp_path / "k710.pth", tmp_path / "union.safetensors", "own", frames=4)
    convert(tmp_path / "union.safetensors", tmp_path / "again.pth", "released", head=head)
    again = read_state(tmp_path / "again.pth")
    assert torch.equal(again["backbone.transformer.proj.2.weight"], found.model.head.weight)


def test_a_mismatch_is_refused(tmp_path: Path) -> None:
    def refusal(source: Path, to: Any = "own", frames: int | None = 4, **arguments: Any) -> str:
        with pytest.raises(RunError) as caught:
            convert(source, tmp_path / "out.safetensors", to, frames=frames, **arguments)
        assert not (tmp_path / "out.safetensors").exists()
        return str(caught.value)

    torch.save(to_file(small(600), port=True), tmp_path / "k600.pth")
    assert "the head has 600 rows" in refusal(tmp_path / "k600.pth", head="k400")
    torch.save(to_file(small(5), port=False), tmp_path / "five.pth")
    assert "3 class names were given" in refusal(tmp_path / "five.pth", class_names=("a", "b", "c"))
    names = tuple(f"other {number}" for number in range(710))
    torch.save(to_file(small(), port=False), tmp_path / "k710.pth")
    convert(tmp_path / "k710.pth", tmp_path / "own.safetensors", "own", frames=4, class_names=names)
    assert "400 of the manifest's 400 classes" in refusal(tmp_path / "own.safetensors", head="k400")
    assert "--labels" in refusal(tmp_path / "own.safetensors", labels="mmaction2")
    convert(tmp_path / "k710.pth", tmp_path / "union.safetensors", "own", frames=4)
    beit = small(3, backbone="beit")
    from tests.trainer.setup.test_starting_weights import exported

    exported(tmp_path / "beit.safetensors", beit, ("a", "b", "c"))
    assert "activation is 'gelu'" in refusal(tmp_path / "beit.safetensors", "released")
    assert "--frames 8" in refusal(tmp_path / "five.pth", frames=None)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "none.pth")
    assert "none.pth" in refusal(tmp_path / "none.pth")
    tower = {f"visual.{name}": value for name, value in image_tower_state().items()}
    torch.save(tower, tmp_path / "clip.pt")
    for frames in (None, 4):
        assert "is an image model, CLIP" in refusal(tmp_path / "clip.pt", frames=frames)


def test_the_source_is_not_replaced(tmp_path: Path) -> None:
    torch.save({"model_state": to_file(small(5), port=False)}, tmp_path / "five.pth")
    convert(tmp_path / "five.pth", tmp_path / "run" / "weights.safetensors", "own", frames=4)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "same.pth").hardlink_to(tmp_path / "five.pth")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    for source, out in (
        ("five.pth", "five.pth"),
        ("five.pth", "same.pth"),
        ("run/weights.safetensors", "link/weights.safetensors"),
        ("run", "run/weights.safetensors"),
        ("link", "run/weights.safetensors"),
    ):
        with pytest.raises(RunError, match=r"the source; name another --out"):
            convert(tmp_path / source, tmp_path / out, "own", frames=4)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before
    for _ in range(2):
        convert(tmp_path / "run", tmp_path / "run" / "released.pyth", "released")
