"""Which tensors decay, and how large each step is (paper, table 11 and section 4.1)."""

import math
from typing import Any

from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters for AdamW; frozen ones are left out.

    Weight decay acts on tensors of two or more dimensions only: matrices and convolutions. Biases and the
    scales of norms have one dimension, and pulling those towards zero does not regularise.

    Args:
        model: its parameters in their own order, each once even if shared.
        weight_decay: of the first group.

    Returns:
        Up to two groups, `{"params", "weight_decay"}`, none of them empty.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


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
