"""Image weights: a video model with one frame computes the image model's class token."""

import logging

import open_clip
import pytest
import timm
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from safetensors.torch import save_file

from models import ModelError, build_config
from models.image_weights import load_image_weights
from models.uniformerv2 import UniFormerV2

CLIP = {"resolution": 32, "patch_size": 8, "width": 32, "depth": 3, "heads": 4, "mlp_ratio": 4.0}


def video_model(**overrides):
    fields = {"form": "scene", "frames": 1, "num_classes": 3, "global_layers": (), **CLIP, **overrides}
    return UniFormerV2(build_config("tiny", **fields)).eval()


def class_tokens(model, clips):
    return model._backbone(clips)[0][:, :, 0]  # B T C


@pytest.fixture
def tower():
    """A small visual tower of CLIP with every tensor random."""
    tower = VisionTransformer(32, 8, 32, 3, 4, 4.0, output_dim=16, act_layer=QuickGELU).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        tower.ln_post.reset_parameters()
    return tower


def clip_state(tower):
    return {f"visual.{name}": tensor for name, tensor in tower.state_dict().items()}


def same_as_clip(tower, model, images):
    tokens = class_tokens(model, images.unsqueeze(2))[:, 0]
    torch.testing.assert_close(tower.ln_post(tokens) @ tower.proj, tower(images), atol=1e-5, rtol=1e-5)


def test_one_frame_gives_the_class_token_of_clip(tower):
    model = video_model()
    report = load_image_weights(model, clip_state(tower) | {"logit_scale": torch.ones(())})
    same_as_clip(tower, model, torch.randn(2, 3, 32, 32))
    assert set(report.left_out) == {"ln_post.weight", "ln_post.bias", "proj"}
    assert set(report.kept) == {"head_norm.weight", "head_norm.bias", "head.weight", "head.bias"}
    assert report.adapted == ()


def test_a_whole_clip_of_open_clip_is_understood():
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 8}
    text = {"context_length": 4, "vocab_size": 8, "width": 16, "heads": 2, "layers": 1}
    clip = open_clip.CLIP(16, vision, text, quick_gelu=True).eval()
    model = video_model()
    load_image_weights(model, clip.state_dict())
    same_as_clip(clip.visual, model, torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_files_are_read(tower, tmp_path, suffix):
    path = tmp_path / f"clip.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(clip_state(tower), path)
    model = video_model()
    load_image_weights(model, path)
    same_as_clip(tower, model, torch.randn(2, 3, 32, 32))


def test_inflation_puts_the_image_at_the_centre_tap(tower):
    model = video_model(form="temporal", frames=4, global_layers=(1, 2))
    report = load_image_weights(model, tower.state_dict())
    assert report.adapted == ("patch_embedding.weight",)
    assert {name.split(".")[2] for name in report.kept if name.startswith("blocks.")} == {
        "local_1",
        "local_2",
    }
    weight = model.patch_embedding.weight
    assert torch.equal(weight[:, :, 1], tower.conv1.weight)
    assert not weight[:, :, [0, 2]].any()
    images = torch.randn(2, 3, 32, 32)
    tokens = class_tokens(model, images.unsqueeze(2).expand(-1, -1, 4, -1, -1))
    expected = tower(images).unsqueeze(1).expand(-1, 2, -1)
    torch.testing.assert_close(tower.ln_post(tokens) @ tower.proj, expected, atol=1e-5, rtol=1e-5)


def test_another_resolution_interpolates_and_says_so(tower, caplog):
    model = video_model(resolution=48)
    with caplog.at_level(logging.WARNING):
        report = load_image_weights(model, tower.state_dict())
    assert report.adapted == ("position_embedding",)
    assert "interpolated from 4x4 to 6x6 patches" in caplog.text
    tower.positional_embedding.data[1:] = 0.5
    load_image_weights(model, tower.state_dict())
    torch.testing.assert_close(model.position_embedding[1:], torch.full((36, 32), 0.5))


def test_interpolation_keeps_rows_and_columns_apart(tower):
    rows = torch.arange(4.0).repeat_interleave(4)
    tower.positional_embedding.data[1:] = rows[:, None]
    model = video_model(resolution=64)
    load_image_weights(model, tower.state_dict())
    image = model.position_embedding[1:, 0].view(8, 8)
    torch.testing.assert_close(image, image[:, :1].expand(8, 8))
    assert (image[1:, 0] > image[:-1, 0]).all()


def test_a_plain_vit_of_timm_gives_its_class_token():
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=3
    ).eval()
    model = video_model(activation="gelu", norm_eps=1e-6, ln_pre=False, patch_bias=True)
    head = model.head.weight.clone()
    report = load_image_weights(model, vit.state_dict())
    images = torch.randn(2, 3, 32, 32)
    tokens = class_tokens(model, images.unsqueeze(2))[:, 0]
    torch.testing.assert_close(vit.norm(tokens), vit.forward_features(images)[:, 0], atol=1e-5, rtol=1e-5)
    assert {"norm.weight", "norm.bias", "head.weight", "head.bias"} == set(report.left_out)
    assert torch.equal(model.head.weight, head)


def test_what_does_not_fit_is_listed_and_changes_nothing(tower):
    state = tower.state_dict()
    del state["transformer.resblocks.1.ln_1.bias"]
    state["transformer.resblocks.3.ln_1.bias"] = torch.zeros(32)
    state["ln_pre.weight"] = torch.zeros(7)
    model = video_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError) as refusal:
        load_image_weights(model, state)
    for problem in [
        "missing blocks.1.norm_1.bias",
        "unexpected transformer.resblocks.3.ln_1.bias",
        "ln_pre.weight has shape (7,), expected is (32,)",
    ]:
        assert problem in str(refusal.value)
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)
