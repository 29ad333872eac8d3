"""The plain model computes what `models.UniFormerV2` computes, outputs and gradients."""

import pytest
import torch

from benchmarks.plain import DropPath, PlainUniFormerV2, load_weights, plain_name
from models import ModelError, UniFormerV2, build_config

FORMS = {
    "scene": {"form": "scene"},
    "temporal": {"form": "temporal"},
    "frozen": {"form": "scene", "frozen_backbone": True},
}
# In float64. The softmax of `CrossAttention` is float32 in any case, which bounds the agreement.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}
NARROW = {"resolution": 16, "width": 16, "depth": 3, "heads": 2, "global_heads": 4, "frames": 4}


def narrow_config(kind: str, **overrides):
    return build_config("tiny", num_classes=5, **NARROW, **FORMS[kind], **overrides)


@pytest.fixture(params=FORMS)
def pair(request):
    """This project's model and the plain one with the same random weights, in float64."""
    torch.manual_seed(0)
    config = narrow_config(request.param)
    ours, plain = UniFormerV2(config).double(), PlainUniFormerV2(config).double()
    with torch.no_grad():
        # Zero-initialised tensors would hide whatever comes before them.
        for parameter in ours.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    load_weights(plain, ours.state_dict())
    return ours, plain


@pytest.fixture
def clips():
    torch.manual_seed(1)
    return torch.randn(2, 3, 4, 16, 16, dtype=torch.float64)


def test_outputs_and_gradients_are_equal(pair, clips):
    ours, plain = pair
    expected, found = ours(clips), plain(clips)
    torch.testing.assert_close(found, expected, **CLOSE)
    for logits in (expected, found):
        torch.nn.functional.cross_entropy(logits, torch.tensor([1, 3])).backward()
    of_plain = {name: parameter.grad for name, parameter in plain.named_parameters()}
    trained = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert trained and {id(value) for value in plain.trained_parameters()} == {
        id(plain.get_parameter(plain_name(name))) for name in trained
    }
    for name, parameter in trained.items():
        gradient = of_plain[plain_name(name)]
        assert name.endswith("in_proj_bias") or parameter.grad.abs().max() > 1e-6, name
        torch.testing.assert_close(
            gradient.view_as(parameter),
            parameter.grad,
            **CLOSE,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_outputs_after_training_steps_are_equal_in_evaluation(pair, clips):
    """Batch norms update and use their running statistics alike."""
    ours, plain = pair
    for model in pair:
        model(clips)
        model.eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(clips), ours(clips), **CLOSE)


def test_autograd_passes_through_a_frozen_backbone_only_if_asked(clips):
    config = narrow_config("frozen")
    passes, begins = PlainUniFormerV2(config), PlainUniFormerV2(config, through_frozen=False)
    for model in (passes, begins):
        torch.nn.init.normal_(model.global_blocks[-1].attention.out_proj.weight)
        model(clips.float()).sum().backward()
    assert passes.class_token.grad is not None
    assert begins.class_token.grad is None
    assert len(passes.trained_parameters()) == len(begins.trained_parameters())


def test_norms_are_computed_in_float32_under_autocast(clips):
    model = PlainUniFormerV2(narrow_config("scene"))
    seen = []
    model.blocks[1].norm_1.register_forward_hook(lambda norm, given, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(clips.float()).dtype == torch.bfloat16
    assert seen == [torch.float32]  # that of the residual stream


def test_drop_path_drops_whole_clips_and_keeps_the_mean():
    torch.manual_seed(0)
    dropped = DropPath(0.25)(torch.ones(3, 4000, 2), clips=2000)
    frames = dropped.view(3, 2000, 2, 2)
    assert (frames == frames[:1, :, :1, :1]).all()
    assert abs(float(dropped.mean()) - 1) < 0.05
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])


def test_other_models_are_refused():
    with pytest.raises(ModelError, match="fusion sequential, not parallel"):
        PlainUniFormerV2(narrow_config("scene", fusion="parallel"))
