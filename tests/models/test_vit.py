"""Parts of the image ViT against PyTorch's equivalents."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models import build_config
from models.vit import Mlp, PatchEmbedding, SpatialAttention


@pytest.mark.parametrize("form", ["scene", "temporal"])
@pytest.mark.parametrize("bias", [False, True])
def test_patch_embedding_is_the_convolution(form, bias):
    config = build_config("tiny", form=form, frames=8, num_classes=2, resolution=24, patch_bias=bias)
    embed = PatchEmbedding(config)
    nn.init.normal_(embed.weight)
    if bias:
        nn.init.normal_(embed.bias)
    clips = torch.randn(2, 3, 8, 24, 24)
    stride, padding = ((2, 8, 8), (1, 0, 0)) if form == "temporal" else ((1, 8, 8), 0)
    expected = F.conv3d(clips, embed.weight, embed.bias, stride=stride, padding=padding)  # B C T H W
    torch.testing.assert_close(embed(clips), expected.flatten(3).permute(0, 2, 3, 1), atol=1e-4, rtol=1e-4)


def test_spatial_attention_is_multihead_attention_inside_each_frame():
    attention = SpatialAttention(width=24, heads=3, qkv_bias=True)
    reference = nn.MultiheadAttention(24, 3, batch_first=True)
    reference.in_proj_weight.data = attention.qkv.weight.data
    reference.in_proj_bias.data = attention.qkv.bias.data
    reference.out_proj.load_state_dict(attention.out.state_dict())
    x = torch.randn(2, 4, 5, 24)  # B T L C
    frames = x.flatten(0, 1)
    expected = reference(frames, frames, frames)[0].view_as(x)
    torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=1e-5)


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize(("activation", "reference"), [("quick_gelu", quick_gelu), ("gelu", F.gelu)])
def test_mlp_is_linear_activation_linear(activation, reference):
    mlp = Mlp(16, 64, activation)
    x = torch.randn(3, 7, 16, requires_grad=True)
    expected = F.linear(reference(F.linear(x, mlp.expand.weight, mlp.expand.bias)), mlp.contract.weight)
    expected = expected + mlp.contract.bias
    tensors = [x, *mlp.parameters()]
    torch.testing.assert_close(mlp(x), expected, atol=1e-6, rtol=1e-5)
    given = torch.autograd.grad(mlp(x).square().sum(), tensors)
    wanted = torch.autograd.grad(expected.square().sum(), tensors)
    torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-4)


def test_folding_the_slope_into_bfloat16_weights_costs_no_accuracy():
    """Rounding 1.702 W is no worse than rounding 1.702 x, which the written formula does."""
    mlp = Mlp(256, 1024, "quick_gelu")
    x = torch.randn(512, 256)
    with torch.no_grad():
        mlp.bfloat16()
        x = x.bfloat16()
        written = mlp.contract.bias + F.linear(
            quick_gelu(F.linear(x, mlp.expand.weight, mlp.expand.bias)), mlp.contract.weight
        )
        folded = mlp(x)
        exact = Mlp(256, 1024, "quick_gelu").double()
        exact.load_state_dict(mlp.state_dict())
        truth = exact(x.double())
    error_written = (written.double() - truth).square().mean().sqrt()
    error_folded = (folded.double() - truth).square().mean().sqrt()
    assert error_folded < 1.2 * error_written


def test_layer_norm_of_bfloat16_is_computed_in_float32():
    """PyTorch's kernel converts internally, so no float32 copy of the tokens is needed."""
    norm = nn.LayerNorm(768)
    nn.init.normal_(norm.weight)
    norm.bfloat16()
    x = (100 + torch.randn(64, 768)).bfloat16()
    exact = F.layer_norm(x.float(), (768,), norm.weight.float(), norm.bias.float()).bfloat16()
    difference = (norm(x).float() - exact.float()).abs()
    # One unit in the last place of bfloat16 at most; statistics in bfloat16 would be wrong by half.
    assert (difference <= exact.float().abs() * 2**-7 + 1e-6).all()
