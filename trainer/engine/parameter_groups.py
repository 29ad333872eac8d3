"""Which tensors decay, and how large each step is (paper, table 11 and section 4.1)."""

import math
from typing import Any

from torch import nn


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Split the trainable parameters for AdamW; frozen ones are left out.

    Weight decay acts on tensors of two or more dimensions only: matrices and convolutions. Biases and the
    scales of norms have one dimension, and pulling those towards zero does not regularise.

    With layer-wise decay the nearer a layer of the backbone is to the input, the less it learns, since what
    it knows from images holds for videos too: block i of d has layer_decay ** (d - 1 - i) of the learning
    rate, the embeddings below the blocks one power more. What is beside the backbone or after it is new, and
    has all of it.

    Args:
        model: its parameters in their own order, each once even if shared; the backbone's are known by name.
        weight_decay: of matrices and convolutions.
        layer_decay: above 0, at most 1; None is the same learning rate for all.

    Returns:
        Groups `{"params", "weight_decay", "lr_scale"}`, none of them empty and no two alike but for their
        parameters; small scales first, and of one scale what decays first. `lr_scale` is to be multiplied
        with the learning rate of each step.
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


_BESIDE = -1
_EMBEDDINGS = ("patch_embedding", "class_token", "position_embedding", "ln_pre")


def _block(name: str) -> int:
    """The number of the backbone's block that a parameter is in, or `_BESIDE`."""
    part, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if part == "blocks" else _BESIDE


def _layers_above(name: str, depth: int) -> int:
    """Blocks between a parameter and the end of the backbone; 0 for one that is not in it."""
    if name.partition(".")[0] in _EMBEDDINGS:
        return depth
    return 0 if _block(name) == _BESIDE else depth - 1 - _block(name)


def learning_rate(
    step: int, *, total_steps: int, warmup_steps: int, peak: float, start: float, end: float
) -> float:
    """Learning rate of one optimiser step: a straight line up, then half a cosine down.

    With w warm-up steps of n in all, for step s counted from 0:

        s < w:  start + (peak - start) * s / w
        s >= w: end + (peak - end) * (1 + cos(pi * (s - w) / (n - w))) / 2

    so that step w has the peak and `end` is approached, and reached by a step n that is not taken. Steps
    past the end keep `end`.

    Args:
        step: from 0.
        total_steps: n, at least 1.
        warmup_steps: w, from 0 to n.
        peak, start, end: learning rates at the top, at step 0 of the warm-up, and at the end.
    """
    if step < warmup_steps:
        return start + (peak - start) * step / warmup_steps
    if step >= total_steps:
        return end
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return end + (peak - end) * (1 + math.cos(math.pi * progress)) / 2
