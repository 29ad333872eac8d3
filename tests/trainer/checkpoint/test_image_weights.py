"""`prepare.py weights`: checkpoints of every naming become files that a model loads."""

import json
import warnings
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from models import UniFormerV2, build_config
from models.weights.files import WeightSource
from models.weights.image_backbones import load_image_weights
from tests.launch.scripts import run_script
from tests.models.hugging_face_models import FILE, numbers
from trainer.checkpoint.image_weights import prepare_image_weights
from trainer.errors import RunError

VISION = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 64}
TEXT = {"context_length": 4, "vocab_size": 8, "width": 16, "heads": 2, "layers": 1}
SIZE = {"resolution": 32, "patch_size": 8, "width": 64, "depth": 2, "heads": 1}


def clip() -> Any:
    return open_clip.CLIP(16, VISION, TEXT, quick_gelu=True).eval()


def timm_state(name: str) -> dict[str, torch.Tensor]:
    model = timm.create_model(name, img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1)
    return {key: torch.randn_like(value) for key, value in model.state_dict().items()}


def hugging_face_state(name: str) -> dict[str, torch.Tensor]:
    tensors = json.loads(FILE.read_text())[name]["tensors"]
    return {key: numbers(key, tuple(shape)) for key, shape in tensors.items()}


def loaded(backbone: str, source: WeightSource, **size: int) -> UniFormerV2:
    fields: dict[str, Any] = {
        **SIZE,
        **size,
        "form": "scene",
        "frames": 1,
        "num_classes": 2,
        "global_layers": (),
    }
    torch.manual_seed(0)
    model = UniFormerV2(build_config("b16", backbone=backbone, **fields))
    load_image_weights(model, source)
    return model


def same(found: UniFormerV2, expected: UniFormerV2) -> None:
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), atol=0, rtol=0)


def test_openais_archive_is_read_and_not_executed(tmp_path: Path) -> None:
    model = clip()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        script = torch.jit.trace(model.visual.half().float(), torch.randn(1, 3, 32, 32))
        whole = torch.nn.Module()
        whole.visual = script
        torch.jit.save(torch.jit.script(whole), str(tmp_path / "ViT.pt"))
    out = tmp_path / "clip.safetensors"
    result = run_script("prepare.py", "weights", tmp_path / "ViT.pt", "--out", out)
    assert result.returncode == 0, result.stderr
    for words in (
        "CLIP as OpenAI and open_clip name it under visual.",
        "no code in it was executed",
        "width 64, 2 blocks of 1 heads, patches of 8, 32 x 32 pixels",
        "no preset has this size: set model.overrides",
        "its activation is not in the file",
    ):
        assert words in result.stdout
    state = {f"visual.{name}": tensor for name, tensor in model.visual.state_dict().items()}
    same(loaded("clip", out), loaded("clip", state))
    with safe_open(out, framework="pt") as file:
        assert "conv1.weight" in file.keys() and "proj" not in file.keys()  # noqa: SIM118
        assert file.metadata()["backbone"] == "clip" and file.metadata()["source"] == "ViT.pt"


@pytest.mark.parametrize(
    ("backbone", "name"),
    [
        ("clip", "vit_base_patch16_clip_quickgelu_224"),
        ("supervised", "vit_base_patch16_224"),
        ("deit3", "deit3_base_patch16_224"),
        ("beit", "beit_base_patch16_224"),
    ],
)
def test_timms_checkpoints(backbone: str, name: str, tmp_path: Path) -> None:
    state = timm_state(name)
    torch.save({"model": state, "epoch": 3}, tmp_path / "source.pth")
    out = tmp_path / "new" / "folder" / "out.safetensors"
    lines = prepare_image_weights(tmp_path / "source.pth", out)
    assert "timm" in lines[0] and "head" in lines[2]
    same(loaded(backbone, out), loaded(backbone, state))


@pytest.mark.parametrize("name", json.loads(FILE.read_text()))
def test_folders_of_hugging_face(name: str, tmp_path: Path) -> None:
    state = {key: value.half() for key, value in hugging_face_state(name).items()}
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"hidden_act": "gelu", "hidden_size": 16}))
    out = tmp_path / "out.safetensors"
    backbone = name.partition(",")[0]
    heads = 2 if backbone == "beit" else 1
    lines = prepare_image_weights(folder, out)
    assert "Hugging Face" in lines[0] and "float16" in lines[3]
    same(loaded(backbone, out, width=16, heads=heads), loaded(backbone, state, width=16, heads=heads))
    needed = "set model.overrides.activation: gelu" if backbone == "clip" else "the default"
    assert f"its activation is gelu: {needed}" in lines
    for activation in ("relu", 3, ["gelu"]):
        (folder / "config.json").write_text(json.dumps({"vision_config": {"hidden_act": activation}}))
        with pytest.raises(RunError, match=r"config\.json: the activation is .*quick_gelu or gelu"):
            prepare_image_weights(folder, tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


def test_a_preset_is_named_where_it_fits(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = timm.create_model("beit_base_patch16_224", img_size=64).state_dict()
    zeros = {key: torch.zeros(value.shape, dtype=torch.float16) for key, value in shapes.items()}
    torch.save(zeros, tmp_path / "beit.pth")
    lines = "\n".join(prepare_image_weights(tmp_path / "beit.pth", tmp_path / "o.safetensors"))
    assert "model.preset: b16, model.backbone: beit" in lines
    assert "unless model.overrides.resolution is 64" in lines


def test_what_is_not_an_image_vit_is_refused(tmp_path: Path) -> None:
    def refusal(source: Path, out: Path = tmp_path / "out.safetensors") -> str:
        with pytest.raises(RunError) as caught:
            prepare_image_weights(source, out)
        assert not out.exists() or out == source
        return str(caught.value)

    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "model.safetensors.index.json").write_text("{}")
    assert "weights in several parts" in refusal(tmp_path / "empty")
    state = timm_state("beit_base_patch16_224")
    torch.save(state, tmp_path / "beit.pth")
    assert "is the file to read" in refusal(tmp_path / "beit.pth", tmp_path / "beit.pth")
    del state["blocks.1.attn.qkv.weight"]
    torch.save(state, tmp_path / "part.pth")
    assert "missing blocks.1.attention.qkv.weight" in refusal(tmp_path / "part.pth")
    del (
        state["blocks.0.attn.relative_position_bias_table"],
        state["blocks.1.attn.relative_position_bias_table"],
    )
    torch.save(state, tmp_path / "nowhere.pth")
    assert "no position embedding" in refusal(tmp_path / "nowhere.pth")
    for shape, message in (((), "is a single number"), ((1, 0, 64), "-1 patches is not a square grid")):
        torch.save({**state, "pos_embed": torch.zeros(shape)}, tmp_path / "positions.pth")
        assert message in refusal(tmp_path / "positions.pth")
    torch.save({"layer1.0.conv1.weight": torch.zeros(2)}, tmp_path / "resnet.pth")
    assert "a ResNet" in refusal(tmp_path / "resnet.pth")
    assert "none.pth" in refusal(tmp_path / "none.pth")
    (tmp_path / "present.safetensors").touch()
    with pytest.raises(RunError, match=r"none\.pth"):
        prepare_image_weights(tmp_path / "none.pth", tmp_path / "present.safetensors")
