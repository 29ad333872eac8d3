"""What a model looks at in a clip: the attention of its global blocks, and what speaks for a class."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import ModelError
from models.global_block import GlobalUniBlock
from models.uniformerv2 import UniFormerV2


@dataclass(frozen=True)
class GlobalAttention:
    """Of each global block, averaged over heads and queries; all of a clip's shares in a block sum to 1.

    patches: (B, blocks, T, h, w), the share of each patch. class_tokens: (B, blocks, T), of each frame's
    class token. context: (B, blocks), of earlier video tokens, which only the fusion `hierarchical_kv` has.

    T: frames inside the model, half as many as the clip's where `temporal_downsample` is set: frame t then
    covers frames 2t - 1 to 2t + 1 of the clip.
    """

    patches: Tensor
    class_tokens: Tensor
    context: Tensor


def global_attention(model: UniFormerV2, clips: Tensor) -> GlobalAttention:
    """How the query of each global block weighs the clip's tokens, equation (11): B 3 T H W.

    The affinities are computed once more from what each block's attention was given, so the forward pass of
    training has no part in this. The model has to be in evaluation mode.

    Raises ModelError for clips that the model does not take, and for a model without global blocks.
    """
    blocks = _global_blocks(model)
    given: list[tuple[Tensor, ...]] = []
    hooks = [
        block.attention.register_forward_pre_hook(lambda _, inputs: given.append(inputs)) for block in blocks
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
        for block, (queries, tokens) in zip(blocks, given, strict=True):
            shares = block.attention.affinity(queries, tokens).float().mean(dim=1)  # B M
            frames = shares.shape[1] // (1 + grid**2)
            earlier = shares.shape[1] - frames * (1 + grid**2)
            by_frame = shares[:, earlier:].unflatten(1, (frames, 1 + grid**2))  # B T 1+N
            patches.append(by_frame[:, :, 1:].unflatten(2, (grid, grid)))
            class_tokens.append(by_frame[:, :, 0])
            context.append(shares[:, :earlier].sum(dim=1))
    return GlobalAttention(*(torch.stack(parts, dim=1) for parts in (patches, class_tokens, context)))


def class_activation(model: UniFormerV2, clips: Tensor, labels: Tensor) -> Tensor:
    """How much each patch speaks for a class: B 3 T H W, B -> B T h w, not negative.

    HiResCAM (Draelos and Carin 2020) on the tokens x that enter the block after which the first global block
    reads, or the last block where there are none: all that reaches the logit y of the class passes through
    them, whether by the global blocks or by the class tokens.

        activation(t, n) = max(0, sum over channels c of x(t, n, c) * dy / dx(t, n, c))

    Grad-CAM, which averages the gradient over all patches before the product, is not used: a ViT's patches
    differ too much in it. On the embedded data set, after the quickstart, this map has more of its mass on
    the moving shape than the shape has of the area in 95 % of 64 validation clips; Grad-CAM in 62 %.

    The model has to be in evaluation mode; its parameters and their gradients are left alone. The maps have
    as many frames as the model has inside. Raises ModelError for clips that the model does not take.
    """
    config = model.config
    block = model.blocks[config.global_layers[0] if config.global_layers else -1]
    entering: list[Tensor] = []

    def begin(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        torch.set_grad_enabled(True)  # nothing of what comes before is kept for the backward
        tokens = inputs[0].detach().requires_grad_()
        entering.append(tokens)
        return tokens, *inputs[1:]

    hook = block.register_forward_pre_hook(begin)
    try:
        with torch.no_grad():  # whose end brings back the caller's mode, too
            logits = model(clips)
    finally:
        hook.remove()
    (tokens,) = entering
    chosen = F.one_hot(labels, config.num_classes).to(logits.dtype)
    (gradient,) = torch.autograd.grad(logits, tokens, chosen)
    products = (tokens.detach() * gradient)[:, :, 1:].float().sum(dim=-1)  # B T N
    return products.clamp(min=0).unflatten(2, (config.grid, config.grid))


def _global_blocks(model: UniFormerV2) -> list[GlobalUniBlock]:
    if model.fusion is None:
        raise ModelError("the model has no global blocks: there is no attention over space and time to show")
    return [block for block in model.fusion.blocks if isinstance(block, GlobalUniBlock)]
