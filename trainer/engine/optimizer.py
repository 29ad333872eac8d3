"""AdamW that skips a nonfinite step on the device, and its parameter groups."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_BESIDE = -1
# Elements that a CPU updates at a time. AdamW is nine operations, each over all elements; the weights, the
# gradient and the moments of so many stay in its caches between them (docs/performance.md, "the update").
_PIECE = 2**18
_EMBEDDINGS = ("patch_embedding", "class_token", "position_embedding", "ln_pre")


class SkippableAdamW(torch.optim.AdamW):
    """An AdamW that leaves weights and moments as they are where the gradient is not finite.

    Fused, the kernel itself reads whether it is, so that the host never waits for the device; the step counts
    do not advance either. Otherwise the host reads it: no other AdamW of torch can be skipped on the device.

    A CPU updates large tensors in pieces, which changes no bit of the result and takes less memory.
    """

    def __init__(self, params: Any, is_finite: Callable[[], Tensor], **options: Any) -> None:
        """Args:
        params: as for `torch.optim.AdamW`.
        is_finite: called at each step; whether the gradient is finite, the same on all ranks, as a bool
            tensor without dimensions on the device of the weights.
        options: as for `torch.optim.AdamW`.
        """
        super().__init__(params, **options)
        self._is_finite = is_finite

    def step(self, closure: Any = None) -> Any:
        finite = self._is_finite()
        if self.defaults["fused"]:
            self.found_inf = finite.logical_not().float()
        elif not finite:
            return None
        return super().step(closure)

    def _init_group(self, group: dict[str, Any], params: list[Tensor], *lists: list[Tensor]) -> bool:
        """Fills the lists of what torch updates: weights, gradients, moments and counts of steps."""
        has_complex: bool = super()._init_group(group, params, *lists)
        if not self.defaults["fused"] and params and params[0].device.type == "cpu":
            _split(params, *lists)
        return has_complex


def _split(
    weights: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    _: list[Tensor],  # AMSGrad's
    steps: list[Tensor],
) -> None:
    """Puts pieces of large tensors in the place of the tensors, each with a count of steps to advance."""
    whole = list(zip(weights, gradients, means, squares, steps, strict=True))
    for filled in (weights, gradients, means, squares, steps):
        filled.clear()
    for *tensors, step in whole:
        tensors = [tensor.detach() for tensor in tensors]
        if all(tensor.is_contiguous() for tensor in tensors):
            pieces = list(zip(*(tensor.view(-1).split(_PIECE) for tensor in tensors), strict=True))
        else:
            pieces = [tuple(tensors)]
        for place, piece in zip((weights, gradients, means, squares), zip(*pieces, strict=True), strict=True):
            place.extend(piece)
        steps.extend([step, *(step.clone() for _ in pieces[1:])])


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Split the trainable parameters for AdamW; frozen ones are left out.

    Weight decay acts on tensors of two or more dimensions only: matrices and convolutions. Biases and the
    scales of norms have one dimension, and pulling those towards zero does not regularise.

    With layer-wise decay (paper, table 11 and section 4.1), backbone block i of d has
    layer_decay ** (d - 1 - i) of the learning rate, and the embeddings below the blocks one power more:
    layers near the input hold what images taught them, which holds for videos too. Modules outside the
    backbone are new, and have the whole rate.

    Args:
        model: its parameters in their own order, each once even if shared; names identify the backbone's.
        weight_decay: of matrices and convolutions.
        layer_decay: above 0, at most 1; None is the same learning rate for all.

    Returns:
        Groups `{"params", "weight_decay", "lr_scale"}`, none empty, one per pair of the latter two; small
        scales first, and of one scale the decayed ones first. The caller multiplies the learning rate of each
        step by `lr_scale`.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    depth = 1 + max((_block(name) for name, _ in model.named_parameters()), default=_BESIDE)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trainable:
        scale = 1.0 if layer_decay is None else layer_decay ** _layers_above(name, depth)
        decay = weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((scale, decay), []).append(parameter)
    return [
        {"params": groups[scale, decay], "weight_decay": decay, "lr_scale": scale}
        for scale, decay in sorted(groups, key=lambda group: (group[0], -group[1]))
    ]


def _block(name: str) -> int:
    """The number of the backbone's block that a parameter is in, or `_BESIDE`."""
    part, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if part == "blocks" else _BESIDE


def _layers_above(name: str, depth: int) -> int:
    """Blocks between a parameter and the end of the backbone; 0 for one that is not in it."""
    if name.partition(".")[0] in _EMBEDDINGS:
        return depth
    return 0 if _block(name) == _BESIDE else depth - 1 - _block(name)
