"""Released checkpoints: wrappers, names, inferred configs, refusals, and export."""

import logging

import pytest
import torch
from safetensors.torch import save_file

from models import ModelError
from models.weights.released import load_released, to_released

LAYOUT = {"frames": 4, "heads": 2}


@pytest.fixture
def temporal(small):
    """A model, its released state dict and clips for it."""
    return small("temporal", width=24, mlp_ratio=4.0).eval()


def same_logits(model, other):
    clips = torch.randn(2, 3, 4, 16, 16)
    torch.testing.assert_close(other.eval()(clips), model.eval()(clips), atol=0, rtol=0)


@pytest.mark.parametrize(
    "overrides",
    [
        {"form": "temporal"},
        {"form": "temporal", "local_mhra": 1, "local_reduction": 2.0},
        {"form": "temporal", "temporal_downsample": False, "global_layers": (1,)},
        {"form": "scene"},
        {"form": "scene", "frozen_backbone": True},
        {"form": "scene", "global_layers": ()},
        {"form": "scene", "global_mlp_ratio": 2.0},
    ],
    ids=str,
)
def test_export_and_load_give_the_same_model(small, overrides):
    dropouts = {"global_mlp_dropout": 0.5, "head_dropout": 0.5, "drop_path": 0.0, "global_drop_path": 0.0}
    model = small(**overrides, **dropouts)
    loaded = load_released(to_released(model), **LAYOUT)
    assert loaded.config == model.config
    same_logits(model, loaded)
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]


def wrap_prefix(state):
    return {f"backbone.{name}": tensor for name, tensor in state.items()}


def wrap_nested(state):
    return {"model_state": wrap_prefix(state), "epoch": 3}


def wrap_mmaction(state):
    renamed = {}
    for name, tensor in state.items():
        name = "backbone." + name.replace("transformer.proj.0.", "transformer.norm.")
        renamed[name.replace("backbone.transformer.proj.2.", "cls_head.fc_cls.")] = tensor
    assert "cls_head.fc_cls.weight" in renamed
    return {"meta": {"epoch": 5}, "state_dict": renamed}


@pytest.mark.parametrize("wrap", [wrap_prefix, wrap_nested, wrap_mmaction])
def test_published_wrappers_are_unwrapped(temporal, wrap, tmp_path):
    wrapped = wrap(to_released(temporal))
    same_logits(temporal, load_released(wrapped, **LAYOUT))
    torch.save(wrapped, tmp_path / "weights.pyth")
    same_logits(temporal, load_released(tmp_path / "weights.pyth", **LAYOUT))


def test_safetensors_are_read(temporal, tmp_path):
    save_file(to_released(temporal), tmp_path / "weights.safetensors")
    same_logits(temporal, load_released(tmp_path / "weights.safetensors", **LAYOUT))


class Malicious:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code in the checkpoint ran')",))


def test_a_file_that_cannot_be_trusted_or_read_is_refused(tmp_path):
    torch.save({"model_state": Malicious()}, tmp_path / "evil.pyth")
    (tmp_path / "torn.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    (tmp_path / "torn.pt").write_bytes(b"PK")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    for name, message in [
        ("evil.pyth", "cannot be read"),
        ("torn.safetensors", "cannot be read"),
        ("torn.pt", "cannot be read"),
        ("empty.pt", "holds no tensors"),
        ("none.pt", "no weight file"),
    ]:
        with pytest.raises(ModelError, match=message):
            load_released(tmp_path / name, **LAYOUT)


def test_heads_and_layers_have_the_released_defaults(small):
    model = small(width=128, heads=2, depth=3, global_layers=(1, 2))
    config = load_released(to_released(model), frames=4).config
    assert (config.heads, config.global_heads, config.global_layers) == (2, 2, (1, 2))


def test_missing_unexpected_and_misshaped_tensors_are_listed(temporal):
    state = to_released(temporal)
    del state["transformer.dec.0.ln_3.weight"]
    state["transformer.surplus"] = torch.zeros(1)
    state["transformer.proj.0.bias"] = torch.zeros(5)
    with pytest.raises(ModelError) as refusal:
        load_released(state, **LAYOUT)
    for problem in [
        "missing transformer.dec.0.ln_3.weight",
        "unexpected transformer.surplus",
        "transformer.proj.0.bias has shape (5,), expected is (24,)",
    ]:
        assert problem in str(refusal.value)


def test_weights_of_something_else_are_refused():
    with pytest.raises(ModelError, match="tensor conv1"):
        load_released({"fc.weight": torch.zeros(2, 2)}, frames=8)


def test_another_resolution_is_interpolated_and_logged(small, caplog):
    model = small(resolution=32)
    with caplog.at_level(logging.WARNING):
        loaded = load_released(to_released(model), **LAYOUT, resolution=16)
    assert "interpolated from 4x4 to 2x2 patches" in caplog.text
    assert loaded(torch.randn(1, 3, 4, 16, 16)).shape == (1, 5)
    assert torch.equal(loaded.position_embedding[0], model.position_embedding[0])


def test_bgr_weights_are_converted_to_rgb(temporal, caplog):
    state = to_released(temporal)
    converted = load_released(state, **LAYOUT, bgr_to_rgb=True).eval()
    clips = torch.randn(2, 3, 4, 16, 16)
    torch.testing.assert_close(converted(clips), temporal(clips.flip(1)), atol=1e-5, rtol=1e-5)
    assert not caplog.records
    load_released(state, **LAYOUT)
    assert "expect BGR" in caplog.text


def test_loading_and_exporting_copy_tensors(temporal):
    state = to_released(temporal)
    loaded = load_released(state, **LAYOUT)
    torch.nn.init.zeros_(loaded.head.weight)
    assert state["transformer.proj.2.weight"].any()
    torch.nn.init.zeros_(state["transformer.proj.0.weight"])
    assert temporal.head_norm.weight.any()


@pytest.mark.parametrize(
    "overrides",
    [
        {"fusion": "parallel"},
        {"activation": "gelu"},
        {"patch_bias": True},
        {"layer_scale": 0.1},
        {"absolute_positions": False},
        {"relative_positions": True},
        {"frame_feature": "patch_mean"},
        {"global_mlp_ratio": 0},
    ],
)
def test_a_model_without_a_released_form_is_refused(small, overrides):
    with pytest.raises(ModelError, match=f"{next(iter(overrides))} is "):
        to_released(small(**overrides))
