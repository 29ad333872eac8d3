"""Attention and class activation maps against their definitions."""

import pytest
import torch
from torch import nn

from models import ModelError
from models.attention_maps import clip_maps
from models.config import FUSIONS


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_attention_of_each_block_sums_to_one(small, clips, fusion):
    model = small(form="temporal", fusion=fusion, global_layers=(0, 1)).eval()
    found = clip_maps(model, clips).attention
    assert found.patches.shape == (2, 2, 2, 2, 2) and found.class_tokens.shape == (2, 2, 2)
    total = found.patches.sum((2, 3, 4)) + found.class_tokens.sum(2) + found.context
    torch.testing.assert_close(total, torch.ones(2, 2))
    assert (found.context[:, 1] > 0).all() == (fusion == "hierarchical_kv") and not found.context[:, 0].any()


def test_the_maps_are_the_weights_of_multihead_attention(small, clips):
    model = small(global_layers=(1,)).eval()
    attention = model.fusion.blocks[0].attention
    given = []
    hook = attention.register_forward_pre_hook(lambda _, inputs: given.append(inputs))
    found = clip_maps(model, clips).attention
    hook.remove()
    reference = nn.MultiheadAttention(16, attention.heads, batch_first=True)
    reference.in_proj_weight.data, reference.in_proj_bias.data = (
        attention.in_proj_weight,
        attention.in_proj_bias,
    )
    queries, tokens = given[0]
    _, weights = reference(queries, tokens, tokens)  # B 1 M
    by_frame = weights[:, 0].unflatten(1, (4, 5))
    torch.testing.assert_close(found.patches[:, 0].flatten(2), by_frame[:, :, 1:])
    torch.testing.assert_close(found.class_tokens[:, 0], by_frame[:, :, 0])


@pytest.mark.parametrize("form", ["scene", "temporal"])
def test_activation_is_the_effect_of_scaling_a_patch_on_the_logit(small, clips, form):
    model = small(form=form, depth=3, global_layers=(1, 2)).double().eval()
    clips, labels = clips.double(), torch.tensor([3, 0])
    found = clip_maps(model, clips, labels).activation
    assert found.shape == (2, 2 if form == "temporal" else 4, 2, 2) and found.dtype == torch.float32
    scaled = torch.zeros_like(found)
    step = 1e-2  # not less: the softmax is float32
    with torch.no_grad():
        for frame in range(found.shape[1]):
            for patch in range(4):
                logits = []
                for factor in (1 - step, 1 + step):

                    def scale(_, inputs, place=(frame, 1 + patch), factor=factor):
                        tokens = inputs[0].clone()
                        tokens[:, *place] *= factor
                        return (tokens, *inputs[1:])

                    hook = model.blocks[1].register_forward_pre_hook(scale)
                    logits.append(model(clips).gather(1, labels[:, None])[:, 0])
                    hook.remove()
                scaled[:, frame, patch // 2, patch % 2] = (logits[1] - logits[0]) / (2 * step)
    assert (scaled > 0).any() and (scaled < 0).any()
    torch.testing.assert_close(found, scaled.clamp(min=0), atol=1e-3, rtol=1e-2)


def test_the_model_does_not_change(small, clips):
    model = small(frozen_backbone=True, global_layers=(1,)).eval()
    states = [
        (parameter.requires_grad, parameter.grad, parameter.detach().clone())
        for parameter in model.parameters()
    ]
    clip_maps(model, clips, torch.tensor([1, 1]))
    assert torch.is_grad_enabled()
    assert not any(module._forward_pre_hooks for module in model.modules())
    for parameter, (requires, gradient, value) in zip(model.parameters(), states, strict=True):
        assert parameter.requires_grad == requires and parameter.grad is gradient is None
        assert torch.equal(parameter, value)
    with torch.no_grad():
        clip_maps(model, clips, torch.tensor([1, 1]))
        assert not torch.is_grad_enabled()


def test_without_global_blocks_there_is_activation_and_no_attention(small, clips):
    model = small(global_layers=()).eval()
    found = clip_maps(model, clips)
    assert found.activation.sum() > 0 and found.attention is None
    with pytest.raises(ModelError, match="frames"):
        clip_maps(model, clips[:, :, :3], torch.tensor([1, 1]))
