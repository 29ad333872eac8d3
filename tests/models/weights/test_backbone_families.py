"""Each image ViT of table 8: one frame gives the tokens of timm's, open_clip's or transformers' model."""

import json
import logging

import pytest
import timm
import torch
from open_clip.transformer import QuickGELU, VisionTransformer

from models import ModelError, UniFormerV2, build_config
from models.config import BACKBONES
from models.position import interpolate_position_table
from models.weights.files import StoredWeights
from models.weights.image_backbones import check_image_weights, load_image_weights
from tests.models.hugging_face_models import FILE, images, numbers

NARROW = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5}
TIMM = {  # the backbone of the recipe → timm's models of its family
    "clip": ["vit_base_patch16_clip_quickgelu_224", "vit_large_patch14_clip_quickgelu_336"],
    "supervised": ["vit_base_patch16_224", "vit_large_patch16_224"],
    "deit3": ["deit3_base_patch16_224"],
    "dino": ["vit_base_patch16_224"],
    "mae": ["vit_base_patch16_224"],
    "beit": ["beit_base_patch16_224", "beit_large_patch16_224"],
}


def video_model(backbone, **overrides):
    size = {"resolution": 32, "patch_size": 8, "width": 32, "depth": 3, "heads": 4, "mlp_ratio": 4.0}
    fields = {"form": "scene", "frames": 1, "num_classes": 3, "global_layers": (), **size, **overrides}
    return UniFormerV2(build_config("tiny", backbone=backbone, **fields)).eval()


def image_model(name):
    """timm's model, narrow, with every tensor random."""
    model = timm.create_model(name, **NARROW).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def tokens_before_the_last_norm(vit, pictures):
    vit.norm = torch.nn.Identity()  # the feature is the input of the head's own norm
    with torch.no_grad():
        return vit.forward_features(pictures)


def tokens_of(model, clips):
    with torch.no_grad():
        return model._backbone(clips)[0]  # B T 1+N C


@pytest.mark.parametrize(
    ("backbone", "name"), [(backbone, name) for backbone, names in TIMM.items() for name in names]
)
def test_one_frame_gives_the_tokens_of_timms_model(backbone, name):
    vit, model, pictures = image_model(name), video_model(backbone), torch.randn(2, 3, 32, 32)
    report = load_image_weights(model, vit.state_dict())
    assert all(name.startswith("head") for name in report.kept)
    pictures = pictures.double()
    expected = tokens_before_the_last_norm(vit.double(), pictures)
    tokens = tokens_of(model.double(), pictures.unsqueeze(2))[:, 0]
    torch.testing.assert_close(tokens, expected, atol=1e-9, rtol=1e-9)


def test_the_patch_mean_of_beit_is_the_feature_that_it_was_trained_with():
    vit, model, pictures = (
        image_model("beit_base_patch16_224"),
        video_model("beit"),
        torch.randn(2, 3, 32, 32),
    )
    load_image_weights(model, vit.state_dict())
    with torch.no_grad():
        model.head_norm.load_state_dict(vit.fc_norm.state_dict())
        model.head_norm.eps = vit.fc_norm.eps
        feature = vit.forward_head(vit.forward_features(pictures), pre_logits=True)
        expected = torch.nn.functional.linear(feature, model.head.weight, model.head.bias)
        torch.testing.assert_close(model(pictures.unsqueeze(2)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("patch", "heads"), [(16, 2), (14, 4)])
def test_one_frame_gives_the_class_token_of_open_clips_model(patch, heads):
    side = 4 * patch
    tower = VisionTransformer(side, patch, 32, 3, heads, 4.0, output_dim=8, act_layer=QuickGELU).eval()
    model = video_model("clip", patch_size=patch, resolution=side, heads=heads)
    pictures = torch.randn(2, 3, side, side)
    load_image_weights(model, {f"visual.{key}": value for key, value in tower.state_dict().items()})
    token = tokens_of(model, pictures.unsqueeze(2))[:, 0, 0]
    torch.testing.assert_close(tower.ln_post(token) @ tower.proj, tower(pictures), atol=1e-5, rtol=1e-5)


GOLDEN = json.loads(FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("entry", GOLDEN)
def test_one_frame_gives_the_class_token_of_transformers_model(entry):
    found = GOLDEN[entry]
    state = {name: numbers(name, tuple(shape)) for name, shape in found["tensors"].items()}
    model = video_model(entry.partition(",")[0], width=16, heads=2, depth=2)
    report = load_image_weights(model, state)
    assert "Hugging Face" in report.family
    token = tokens_of(model, images().unsqueeze(2))[:, 0, 0]
    torch.testing.assert_close(token, torch.tensor(found["class_tokens"]), atol=1e-5, rtol=1e-5)


def test_a_bias_of_keys_changes_nothing():
    """So the zero for BEiT's absent one is exact, also in training."""
    model = video_model("beit")
    pictures = torch.randn(2, 3, 1, 32, 32)
    torch.nn.init.normal_(model.blocks[0].attention.qkv.bias)
    before = tokens_of(model, pictures)
    with torch.no_grad():
        model.blocks[0].attention.qkv.bias[32:64] += 1.0
    torch.testing.assert_close(tokens_of(model, pictures), before, atol=1e-5, rtol=1e-5)


def test_each_adaptation_is_in_the_report_and_the_log(caplog):
    cases = (
        ("deit3", "deit3_base_patch16_224", {}, "without one of the class token, which becomes zero"),
        ("beit", "beit_base_patch16_224", {}, "keys: without a bias"),
        (
            "beit",
            "beit_base_patch16_224",
            {"resolution": 48},
            "relative positions: interpolated from 4x4 to 6x6",
        ),
        ("dino", "vit_base_patch16_224", {"resolution": 48}, "embedding: interpolated from 4x4 to 6x6"),
        ("mae", "vit_base_patch16_224", {"temporal_downsample": True, "frames": 2}, "inflated to 3 frames"),
    )
    for backbone, name, overrides, words in cases:
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            report = load_image_weights(video_model(backbone, **overrides), image_model(name).state_dict())
        assert words in "\n".join(report.adaptations) and words in caplog.text


@pytest.mark.parametrize("grid", [3, 6, 7])
def test_tables_of_relative_positions_are_interpolated_as_by_timm(grid):
    from timm.layers.pos_embed_rel import resize_rel_pos_bias_table_simple

    table = torch.randn(7 * 7 + 3, 4)
    resized = interpolate_position_table(table, grid)
    expected = resize_rel_pos_bias_table_simple(table, (grid, grid), ((2 * grid - 1) ** 2 + 3, 4))
    torch.testing.assert_close(resized, expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(resized[-3:], table[-3:])


def test_the_mean_over_the_frames_of_a_patch_is_the_other_inflation():
    vit = image_model("vit_base_patch16_224")
    model = video_model("supervised", form="temporal", frames=8, drop_path=0.0)
    load_image_weights(model, vit.state_dict(), inflation="mean")
    weight = model.patch_embedding.weight
    assert torch.equal(weight[:, :, 0], weight[:, :, 2])
    torch.testing.assert_close(weight.sum(2), vit.patch_embed.proj.weight)
    pictures = torch.randn(2, 3, 32, 32)
    tokens = tokens_of(model, pictures.unsqueeze(2).expand(-1, -1, 8, -1, -1))
    expected = vit.patch_embed(pictures)
    patches = model.patch_embedding(pictures.unsqueeze(2).expand(-1, -1, 8, -1, -1))
    assert tokens.shape[1] == 4  # the first of them sees a frame of padding
    for frame in (1, 2, 3):
        torch.testing.assert_close(patches[:, frame], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_weights_of_another_backbone_are_refused_with_its_name(backbone):
    names = {"clip": "vit_base_patch16_clip_quickgelu_224", "deit3": "deit3_base_patch16_224"}
    others = {**names, "beit": "beit_base_patch16_224", "supervised": "vit_base_patch16_224"}
    own = backbone if backbone in others else "supervised"
    for other, name in others.items():
        if other != own:
            with pytest.raises(ModelError, match=f"model.backbone: {other}"):
                load_image_weights(video_model(backbone), image_model(name).state_dict())


PUBLISHED = {  # preset, backbone → a published model of timm or open_clip with these sizes
    ("b16", "clip"): "vit_base_patch16_clip_quickgelu_224.openai",
    ("l14", "clip"): "vit_large_patch14_clip_quickgelu_224.openai",
    ("l14_336", "clip"): "vit_large_patch14_clip_quickgelu_336.openai",
    ("b16", "supervised"): "vit_base_patch16_224.augreg_in21k",
    ("l16", "supervised"): "vit_large_patch16_224.augreg_in21k",
    ("b16", "deit3"): "deit3_base_patch16_224.fb_in22k_ft_in1k",
    ("b16", "dino"): "vit_base_patch16_224.dino",
    ("b16", "mae"): "vit_base_patch16_224.mae",
    ("b16", "beit"): "beit_base_patch16_224.in22k_ft_in22k",
    ("l16", "beit"): "beit_large_patch16_224.in22k_ft_in22k",
}


@pytest.mark.parametrize(("preset", "backbone"), PUBLISHED)
def test_every_tensor_of_a_published_model_fits_its_preset(preset, backbone):
    with torch.device("meta"):
        model = timm.create_model(PUBLISHED[preset, backbone])
    state = StoredWeights("timm", model.state_dict(), dict)
    config = build_config(preset, backbone=backbone, form="scene", frames=8, num_classes=400)
    report = check_image_weights(config, state)
    assert not [name for name in report.kept if name.startswith(("blocks.", "patch_", "position_", "ln_pre"))]
    norms = {module.eps for module in model.modules() if isinstance(module, torch.nn.LayerNorm)}
    assert norms == {config.norm_eps}
    assert (
        type(model.blocks[0].mlp.act).__name__
        == {"gelu": "GELU", "quick_gelu": "QuickGELU"}[config.activation]
    )
    assert model.blocks[0].attn.num_heads == config.heads
