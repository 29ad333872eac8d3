"""Image weights: a video model with one frame computes the image model's class token."""

import logging

import open_clip
import pytest
import timm
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from safetensors.torch import save_file

from models import ModelError, build_config
from models.uniformerv2 import UniFormerV2
from models.weights.image_backbones import load_image_weights

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


def hugging_face_state(tower, prefix="vision_model."):
    """The tower as transformers' CLIPModel names it, query, key and value apart."""
    names = {
        "conv1.weight": "embeddings.patch_embedding.weight",
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_pre": "pre_layrnorm",
        "ln_post": "post_layernorm",
        "transformer.resblocks": "encoder.layers",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    state = {"visual_projection.weight": tower.proj.T.contiguous(), "logit_scale": torch.ones(())}
    state["text_model.encoder.layers.0.self_attn.q_proj.weight"] = torch.randn(4, 4)
    state[f"{prefix}embeddings.position_ids"] = torch.arange(17)[None]
    for name, tensor in tower.state_dict().items():
        if name == "proj":
            continue
        for open_clip_name, other in names.items():
            name = name.replace(open_clip_name, other)
        if ".attn.in_proj_" in name:
            for part, values in zip("qkv", tensor.chunk(3), strict=True):
                state[prefix + name.replace("attn.in_proj_", f"self_attn.{part}_proj.")] = values.clone()
        else:
            state[prefix + name] = tensor.clone()
    return state


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


def test_a_whole_clip_model_of_open_clip_loads():
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 8}
    text = {"context_length": 4, "vocab_size": 8, "width": 16, "heads": 2, "layers": 1}
    clip = open_clip.CLIP(16, vision, text, quick_gelu=True).eval()
    model = video_model()
    load_image_weights(model, clip.state_dict())
    same_as_clip(clip.visual, model, torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("prefix", ["vision_model.", "model.vision_model.", ""])
def test_hugging_face_names_give_the_same_tensors(tower, tmp_path, prefix):
    named_otherwise = hugging_face_state(tower, prefix)
    assert f"{prefix}encoder.layers.2.self_attn.k_proj.bias" in named_otherwise
    save_file(named_otherwise, tmp_path / "model.safetensors")
    model, expected = video_model(), video_model()
    expected.load_state_dict(model.state_dict())
    report = load_image_weights(model, tmp_path / "model.safetensors")
    load_image_weights(expected, clip_state(tower))
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), atol=0, rtol=0)
    same_as_clip(tower, model, torch.randn(2, 3, 32, 32))
    left_out = {"post_layernorm.weight", "post_layernorm.bias", "embeddings.position_ids"}
    text = {"text_model.encoder.layers.0.self_attn.q_proj.weight", "logit_scale"}
    assert set(report.left_out) == left_out | {"visual_projection.weight"} | (set() if prefix else text)


def test_a_missing_part_of_query_key_and_value_is_named(tower):
    state = hugging_face_state(tower)
    del state["vision_model.encoder.layers.1.self_attn.k_proj.weight"]
    state["vision_model.encoder.layers.2.self_attn.q_proj.bias"] = torch.zeros(7)
    with pytest.raises(ModelError, match="read as CLIP as Hugging Face names it") as refusal:
        load_image_weights(video_model(), state)
    assert "blocks.1.attention.qkv.weight needs query, key and value" in str(refusal.value)
    assert "layers.2.self_attn.q_proj.bias has shape (7,), expected is (32,)" in str(refusal.value)


@pytest.mark.parametrize("prefix", ["", "visual.", "model.visual.", "module.visual."])
def test_a_tower_is_found_under_any_prefix(tower, prefix):
    model = video_model()
    text = {"transformer.resblocks.0.ln_1.weight": torch.ones(8)} if prefix else {}
    load_image_weights(model, {f"{prefix}{n}": t for n, t in tower.state_dict().items()} | text)
    same_as_clip(tower, model, torch.randn(2, 3, 32, 32))


def block_names(pattern, count=30):
    return {pattern.format(i): torch.zeros(2, 2) for i in range(count)}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (block_names("text_model.encoder.layers.{}.self_attn.q_proj.weight"), "CLIP's text tower alone"),
        (block_names("base_model.encoder.layers.{}.self_attn.q_proj.lora_A.weight"), "LoRA"),
        (block_names("vision_model.head.probe.{}"), "SigLIP"),
        (block_names("layer1.{}.conv1.weight"), "a ResNet"),
        (
            block_names("visual.layer1.{}.bn1.weight") | {"visual.conv1.weight": torch.zeros(2, 3, 3, 3)},
            "ResNet",
        ),
        (block_names("blocks.{}.norm1.weight") | {"reg_token": torch.zeros(2, 2)}, "DINOv2 with registers"),
        (block_names("teacher.backbone.blocks.{}.norm1.weight"), "DINO with its teacher"),
        (block_names("decoder_blocks.{}.norm1.weight"), "MAE"),
        (block_names("transformer.resblocks.{}.lmhra1.norm.weight"), "a released UniFormerV2"),
        (block_names("something.{}.else"), "names are unknown"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_origin_of_other_weights_is_named_with_ten_tensors(state, words):
    with pytest.raises(ModelError, match=words) as refusal:
        load_image_weights(video_model(), state)
    message = str(refusal.value)
    assert "Hugging Face names it" in message and f"and {len(state) - 10} more" in message
    assert sum(name in message.replace(",", " ").split() for name in state) <= 10


def test_at_most_ten_problems_are_listed(tower):
    state = {name.replace("resblocks.", "resblocks.1"): t for name, t in clip_state(tower).items()}
    with pytest.raises(ModelError, match=r"and \d+ more") as refusal:
        load_image_weights(video_model(depth=2, global_layers=()), state)
    lines = str(refusal.value).splitlines()
    assert len(lines) == 13
    assert (
        "in the file: width 32, patches of 8, 3 blocks; in the model: width 32, patches of 8, 2" in lines[1]
    )
    assert any("missing" in line for line in lines) and any("unexpected" in line for line in lines)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_read_as_float32(tower, tmp_path, dtype):
    save_file({n: t.to(dtype) for n, t in clip_state(tower).items()}, tmp_path / "w.safetensors")
    model = video_model()
    load_image_weights(model, tmp_path / "w.safetensors")
    assert model.class_token.dtype == torch.float32
    assert torch.equal(model.class_token, tower.class_embedding.to(dtype).float())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("conv1.weight", float("nan")),
        ("transformer.resblocks.1.attn.in_proj_bias", float("inf")),
        ("proj", float("-inf")),
    ],
)
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_nonfinite_weights_are_refused_with_name_and_count(tower, tmp_path, name, value, suffix):
    state = {key: tensor.clone() for key, tensor in clip_state(tower).items()}
    state[f"visual.{name}"].view(-1)[:3] = value
    (save_file if suffix == "safetensors" else torch.save)(state, tmp_path / f"w.{suffix}")
    model = video_model()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match=rf"w\.{suffix} .*not finite.* visual\.{name}: 3 of "):
        load_image_weights(model, tmp_path / f"w.{suffix}")
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)


def test_a_number_beyond_float32_is_refused(tower):
    state = clip_state(tower)
    state["visual.ln_pre.bias"] = torch.full((32,), 1e300, dtype=torch.float64)
    with pytest.raises(ModelError, match=r"not finite.* visual\.ln_pre\.bias: 32 of 32"):
        load_image_weights(video_model(), state)


def test_integer_weights_are_refused(tower):
    state = clip_state(tower)
    state["visual.conv1.weight"] = state["visual.conv1.weight"].to(torch.int8)
    with pytest.raises(ModelError, match=r"visual\.conv1\.weight holds int8, not floating-point numbers"):
        load_image_weights(video_model(), state)


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


def test_another_resolution_is_interpolated_and_logged(tower, caplog):
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


def test_a_refused_file_lists_its_problems_and_changes_nothing(tower):
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
