"""Cross attention and position encoding against PyTorch's own modules."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from models.global_block import CrossAttention, DepthwiseConv3d


@pytest.mark.parametrize("queries", [1, 3])
def test_cross_attention_is_multihead_attention(queries):
    attention = CrossAttention(width=24, heads=3)
    reference = nn.MultiheadAttention(24, 3, batch_first=True)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.3)
    reference.in_proj_weight.data = attention.in_proj_weight.data
    reference.in_proj_bias.data = attention.in_proj_bias.data
    reference.out_proj.load_state_dict(attention.out.state_dict())
    query = torch.randn(2, queries, 24, requires_grad=True)
    tokens = torch.randn(2, 50, 24, requires_grad=True)

    given, expected = attention(query, tokens), reference(query, tokens, tokens)[0]
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)
    grads = torch.autograd.grad(given.square().sum(), [query, tokens, *attention.parameters()])
    wanted = torch.autograd.grad(expected.square().sum(), [query, tokens, *reference.parameters()])
    torch.testing.assert_close(grads, wanted, atol=1e-4, rtol=1e-4)


def test_positions_are_added_to_patches_and_not_to_class_tokens(small):
    block = small().fusion.blocks[0]
    tokens = torch.randn(2, 4, 5, 16)  # B T 1+N C
    moved = block._with_positions(tokens).view_as(tokens)
    assert torch.equal(moved[:, :, 0], tokens[:, :, 0])
    volume = tokens[:, :, 1:].permute(0, 3, 1, 2).reshape(2, 16, 4, 2, 2)
    expected = conv3d(volume, block.dpe).flatten(3).permute(0, 2, 3, 1)
    torch.testing.assert_close(moved[:, :, 1:] - tokens[:, :, 1:], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 4, 3, 5), (1, 1, 2, 2), (3, 2, 1, 1)], ids=str)
def test_the_position_embedding_is_the_depthwise_conv3d(shape):
    batch, frames, height, width = shape
    dpe = DepthwiseConv3d(16).double()
    # As a block has them: the class token of each frame lies between them.
    whole = torch.randn(batch, frames, 1 + height * width, 16, dtype=torch.float64, requires_grad=True)
    tokens = whole[:, :, 1:].unflatten(2, (height, width))
    given = dpe(tokens)
    expected = conv3d(tokens.permute(0, 4, 1, 2, 3), dpe).permute(0, 2, 3, 4, 1)
    torch.testing.assert_close(given, expected)
    towards = torch.randn_like(given)
    inputs = [whole, dpe.weight, dpe.bias]
    torch.testing.assert_close(
        torch.autograd.grad(given, inputs, towards), torch.autograd.grad(expected, inputs, towards)
    )


def conv3d(volume, dpe):  # B C T H W -> B C T H W
    return functional.conv3d(volume, dpe.weight, dpe.bias, padding=1, groups=dpe.groups)


def test_a_new_block_returns_its_query(small):
    block = small(randomised=False).fusion.blocks[0]
    query = torch.randn(2, 1, 16)
    assert torch.equal(block(query, torch.randn(2, 4, 5, 16)), query)


def test_a_new_block_gives_the_backbone_no_gradient(small, clips):
    model = small(global_layers=(0, 1)).eval()
    tokens, features = model._backbone(clips)
    before = [tokens.clone(), *[feature.clone() for feature in features]]
    model.fusion(features)
    torch.testing.assert_close([tokens, *features], before, atol=0, rtol=0)
