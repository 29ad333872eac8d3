"""Properties of every temporal part: independence of clips, frame order, zero initialisation, gradients."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from models import ModelError, UniFormerV2, build_config
from models.attention_maps import clip_maps
from models.config import FUSIONS, TEMPORAL_MODULES
from models.temporal_modules import STAdapter, TemporalAttention, TemporalConvolution, TemporalShift

MEAN_POOLING = {"global_layers": ()}
RIVALS = [module for module in TEMPORAL_MODULES if module != "none"]
PROBE = {"frozen_backbone": True, "global_dpe": False, "global_mlp_ratio": 0}
VARIANTS = {
    "mean_pooling": MEAN_POOLING,
    **{module: {**MEAN_POOLING, "temporal_module": module} for module in RIVALS},
    "one_mhra": {**MEAN_POOLING, "local_mhra": 1},
    "two_mhra": {**MEAN_POOLING, "local_mhra": 2},
    "mhra_and_dpe": {**MEAN_POOLING, "local_mhra": 1, "local_dpe": True},
    "mhra_in_some_layers": {**MEAN_POOLING, "local_mhra": 1, "local_layers": (1,)},
    "adapter_in_some_layers": {**MEAN_POOLING, "temporal_module": "st_adapter", "local_layers": (0,)},
    "global": {},
    "global_without_dpe": {"global_dpe": False},
    "only_global": {"output": "video_token"},
    "temporal_downsample": {**MEAN_POOLING, "temporal_downsample": True},
    "everything": {"local_mhra": 2, "local_dpe": True, "temporal_downsample": True, "global_queries": 3},
    "transformer_of_patches": {
        **MEAN_POOLING,
        "temporal_module": "temporal_transformer",
        "frame_feature": "patch_mean",
    },
    "joint_of_patches": {**MEAN_POOLING, "temporal_module": "joint_mhsa", "frame_feature": "patch_mean"},
    "adapter_in_beit": {
        **MEAN_POOLING,
        "temporal_module": "st_adapter",
        "relative_positions": True,
        "layer_scale": 0.1,
    },
    "transformer_and_global": {"temporal_module": "temporal_transformer"},
    "mhsa_and_global": {"temporal_module": "temporal_mhsa"},
    "frozen": {"frozen_backbone": True},
    "attentive_probe": {"global_layers": (1,), **PROBE},
    "frozen_and_balanced": {"frozen_backbone": True, "output": "balanced"},
    **{f"{fusion}_4_queries": {"fusion": fusion, "global_queries": 4} for fusion in FUSIONS},
}
ORDER_BLIND = {"mean_pooling", "global_without_dpe", "attentive_probe"}


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


@pytest.fixture
def model(variant, small):
    return small(**{"global_layers": (0, 1), **VARIANTS[variant]})


def test_permuted_clips_permute_the_logits(model, clips):
    clips = torch.cat([clips, torch.randn(1, *clips.shape[1:])])
    logits = model.eval()(clips)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(model(clips[order]), logits[order], atol=1e-5, rtol=1e-5)
    assert (logits[0] - logits[1]).abs().max() > 1e-2


def test_the_order_of_frames_matters_with_temporal_parts_only(variant, model, clips):
    change = (model.eval()(clips[:, :, [2, 0, 3, 1]]) - model(clips)).abs().max()
    if variant in ORDER_BLIND:
        assert change < 1e-5
    else:
        assert change > 1e-4


def test_every_trained_parameter_has_a_gradient(model, clips):
    model.train()(clips).square().sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    zero = {name for name, grad in trained.items() if grad is None or not grad.any()}
    # Without a global block after it, nothing reads the patches that leave the last attention.
    unread = {name for name in trained if name.startswith("blocks.1.local_2.")}
    assert zero == (unread if model.fusion is None else set())


# Not zero-initialised: the shift moves channels of the image model's own attention, and joint MHSA attends to
# all frames.
IMAGE_FIELDS = {"temporal_downsample", "frame_feature", "relative_positions", "layer_scale"}
CHANGES_THE_IMAGE_MODEL = {"temporal_shift", "joint_mhsa", "joint_of_patches"}


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in CHANGES_THE_IMAGE_MODEL])
def test_a_new_model_is_its_image_model(name, small, clips):
    """The head's norm cancels the factor 0.5 of the balance; a model that is frozen or has the video token
    only begins at the head's bias instead."""
    fields = {"global_layers": (0, 1), "norm_eps": 1e-12, **VARIANTS[name]}
    model = small(randomised=False, **fields).eval()
    of_image = {key: value for key, value in fields.items() if key in IMAGE_FIELDS}
    image = small(randomised=False, global_layers=(), norm_eps=1e-12, **of_image).eval()
    image.load_state_dict(model.state_dict(), strict=False)
    for both in (model, image):
        both.head_norm.eps = 1e-12
    if model.fusion is not None and model.balance is None:
        expected = model.head.bias.expand(2, -1)
        # A video token of rounding errors alone would be scaled up by a norm with such an epsilon.
        model.head_norm.eps = 1e-5
    else:
        expected = image(clips)
    torch.testing.assert_close(model(clips), expected, atol=1e-4, rtol=0)


def test_joint_attention_with_equal_frames_is_that_of_one_frame(small, clips):
    """Every patch appears four times, and the class token once: not an image model's attention, but one that
    cannot tell frames apart while their positions are zero."""
    model = small(temporal_module="joint_mhsa", global_layers=()).eval()
    nn.init.zeros_(model.temporal_position)
    still = clips[:, :, :1].expand_as(clips)
    torch.testing.assert_close(model(still[:, :, [2, 0, 3, 1]]), model(still), atol=1e-5, rtol=0)
    shuffled = model(clips[:, :, [2, 0, 3, 1]])
    torch.testing.assert_close(shuffled, model(clips), atol=1e-5, rtol=0)


def test_temporal_attention_is_multihead_attention_over_frames():
    config = build_config("tiny", form="scene", frames=4, num_classes=3, width=16, heads=2, resolution=16)
    module = TemporalAttention(config)
    reference = nn.MultiheadAttention(16, 2, batch_first=True)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    reference.in_proj_weight.data = module.attention.qkv.weight.data
    reference.in_proj_bias.data = module.attention.qkv.bias.data
    reference.out_proj.load_state_dict(module.attention.out.state_dict())
    patches = torch.randn(2, 4, 9, 16)  # B T N C
    normed = module.norm(patches).transpose(1, 2).flatten(0, 1)  # BN T C
    expected = reference(normed, normed, normed)[0].unflatten(0, (2, 9)).transpose(1, 2)
    torch.testing.assert_close(module(patches), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [TemporalConvolution, STAdapter])
def test_a_convolution_is_that_over_three_frames(kind):
    config = build_config("tiny", form="scene", frames=4, num_classes=3, width=12, heads=2, local_reduction=2)
    module = kind(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    patches = torch.randn(2, 4, 9, 12)  # B T N C
    reference = nn.Conv3d(
        *[module.temporal.in_channels] * 2, (3, 1, 1), padding=(1, 0, 0), groups=module.temporal.groups
    )
    reference.load_state_dict(
        {
            n: p.view(target.shape)
            for (n, target), p in zip(
                reference.state_dict().items(), module.temporal.state_dict().values(), strict=True
            )
        }
    )

    def convolved(x):
        return reference(x.permute(0, 3, 1, 2).unsqueeze(-1)).squeeze(-1).permute(0, 2, 3, 1)

    if kind is STAdapter:
        expected = module.expand(nn.functional.gelu(convolved(module.reduce(patches))))
    else:
        normed = (patches - patches.mean((0, 1, 2))) / (patches.var((0, 1, 2), correction=0) + 1e-5).sqrt()
        expected = convolved(normed * module.norm.weight + module.norm.bias)
    torch.testing.assert_close(module(patches), expected, atol=1e-4, rtol=1e-4)


def test_the_shift_exchanges_an_eighth_with_each_neighbour():
    patches = torch.randn(2, 4, 9, 16)
    shifted = TemporalShift()(patches)
    torch.testing.assert_close(shifted[:, 1:, :, :2], patches[:, :-1, :, :2])
    torch.testing.assert_close(shifted[:, :-1, :, 2:4], patches[:, 1:, :, 2:4])
    torch.testing.assert_close(shifted[..., 4:], patches[..., 4:])
    assert not shifted[:, 0, :, :2].any() and not shifted[:, -1, :, 2:4].any()


def test_a_layer_without_local_parts_is_that_of_the_image_model(small):
    model = small(local_mhra=2, local_dpe=True, local_layers=(1,))
    names = {name for name in model.state_dict() if ".local_" in name}
    assert names and all(name.startswith("blocks.1.") for name in names)


@pytest.mark.parametrize("module", ["temporal_mhsa", "temporal_convolution", "st_adapter"])
def test_the_branch_of_a_module_is_dropped_by_drop_path(module, small, clips):
    model = small(temporal_module=module, global_layers=()).train()
    kept = model(clips)
    model.blocks[1].drop_temporal.rate = 1 - 1e-9
    model.config = replace(model.config, drop_path=0.5)
    dropped = model(clips, torch.tensor([1, 2]))
    assert (dropped - kept).abs().max() > 1e-4
    for parameter in model.blocks[1].temporal.parameters():
        nn.init.zeros_(parameter)
    torch.testing.assert_close(model(clips), dropped)


def test_several_queries_begin_different_and_with_mean_zero(small):
    query = small(global_queries=4, global_layers=(0, 1), fusion="parallel", randomised=False).fusion.query
    assert query.shape == (1, 8, 16)
    for queries in query[0].split(4):
        assert queries.mean(0).abs().max() < 1e-7
        assert queries.std() > 1e-3


def saved_tensors(model, clips):
    """Tensors that autograd keeps, parameters left out: of the forward until the first global block, and of
    all of it."""
    counts = [0]
    own = {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        counts[-1] += tensor.data_ptr() not in own
        return tensor

    model.fusion.register_forward_pre_hook(lambda *_: counts.append(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(clips)
    backbone, rest = counts
    return backbone, backbone + rest


@pytest.mark.parametrize("autocast", [False, True])
def test_no_graph_is_kept_through_a_frozen_backbone(autocast, small, clips):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        backbone, whole = saved_tensors(small(frozen_backbone=True, drop_path=0.3), clips)
        trained, _ = saved_tensors(small(drop_path=0.3), clips)
    assert backbone == 0
    assert whole > 0 and trained > 10


def test_an_attentive_probe_is_one_cross_attention_and_the_head(small, clips):
    """Its logits are those of PyTorch's modules on the frozen tokens, and nothing else has a gradient."""
    model = small(global_layers=(1,), **PROBE).train()
    block = model.fusion.blocks[0]
    tokens, _ = model._backbone(clips)
    reference = nn.MultiheadAttention(16, 2, batch_first=True)
    reference.load_state_dict(
        {
            "in_proj_weight": block.attention.in_proj_weight,
            "in_proj_bias": block.attention.in_proj_bias,
            "out_proj.weight": block.attention.out.weight,
            "out_proj.bias": block.attention.out.bias,
        }
    )
    query = model.fusion.query.expand(2, -1, -1)
    attended = reference(block.norm_query(query), *[block.norm_tokens(tokens.flatten(1, 2))] * 2)[0]
    expected = model.head(model.head_norm((query + attended)[:, 0]))
    logits = model(clips)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    logits.square().sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.removeprefix("fusion.blocks.0.").split(".")[0] for name in trained} == {
        "fusion", "attention", "norm_query", "norm_tokens", "head_norm", "head"
    }  # fmt: skip


@pytest.mark.parametrize("module", ["temporal_mhsa", "joint_mhsa", "temporal_shift", "temporal_transformer"])
def test_recomputation_changes_no_gradient(module, small, clips):
    plain = small(temporal_module=module, global_layers=()).train()
    frugal = UniFormerV2(small(temporal_module=module, global_layers=(), recomputed_blocks=2).config).train()
    frugal.load_state_dict(plain.state_dict())
    for model in (plain, frugal):
        model(clips).square().sum().backward()
    for one, other in zip(plain.parameters(), frugal.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, atol=0, rtol=0)


@pytest.mark.parametrize("module", RIVALS)
def test_class_activation_has_a_map_for_each_frame(module, small, clips):
    model = small(temporal_module=module, global_layers=()).eval()
    assert clip_maps(model, clips).activation.shape == (2, 4, 2, 2)


@pytest.mark.parametrize(
    "name",
    [
        "st_adapter",
        *(
            pytest.param(name, marks=pytest.mark.soak)
            for name in ("joint_mhsa", "temporal_transformer", "everything")
        ),
    ],
)
def test_variants_run_in_autocast_and_compile_as_one_graph(name, small, clips):
    model = small(**{"global_layers": (0, 1), **VARIANTS[name]}).eval()
    expected = model(clips)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(clips), expected, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(clips).float(), expected, atol=0.3, rtol=0.3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temporal_module": "tsm"}, "temporal_module is 'tsm', allowed is: one of none, temporal_mhsa"),
        ({"temporal_module": "st_adapter", "local_mhra": 1}, "none unless local_mhra is 0"),
        ({"temporal_module": "st_adapter", "frozen_backbone": True}, "none with frozen_backbone"),
        ({"temporal_module": "joint_mhsa"}, "global_layers is .* empty with temporal_module joint_mhsa"),
        ({"temporal_module": "temporal_transformer", "output": "video_token"}, "output is .* balanced"),
        ({"temporal_module": "joint_mhsa", "global_layers": (), "relative_positions": True}, "relative_pos"),
        ({"local_dpe": True}, "local_dpe is True, allowed is: false unless local_mhra"),
        ({"local_dpe": 1, "local_mhra": 1}, "local_dpe is 1, allowed is: true or false"),
        ({"local_mhra": 1, "local_layers": (2, 1)}, "local_layers is .* ascending"),
        ({"local_mhra": 1, "local_layers": (0, 4)}, "local_layers is .* from 0 to 3"),
        ({"local_mhra": 1, "local_layers": ()}, "local_layers is .* local_mhra is 0"),
        ({"local_mhra": 1, "local_layers": "1-4"}, "local_layers is '1-4', allowed is: a list"),
        ({"local_layers": (0,)}, "local_layers is .* null unless"),
        ({"global_queries": 0}, "global_queries is 0, allowed is: a whole number of at least 1"),
        ({"global_dpe": "no"}, "global_dpe is 'no'"),
        ({"output": "class_token"}, "output is 'class_token', allowed is: one of auto, balanced"),
        ({"output": "balanced", "global_layers": ()}, "output is 'balanced', allowed is: auto unless"),
    ],
)
def test_what_does_not_fit_together_is_refused_with_the_field(fields, message):
    with pytest.raises(ModelError, match=message):
        build_config("tiny", form="scene", frames=8, num_classes=10, **fields)
