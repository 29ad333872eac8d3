"""The training loss: cross-entropy of the clips that could be read."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    valid: Tensor,
    mixed: tuple[Tensor, Tensor] | None = None,
    smoothing: float = 0.0,
) -> Tensor:  # B K, B, B -> B
    """Cross-entropy of each clip; zero for a bad one, whose label may be -1.

    mixed: second labels, (B,), and weights of the first, (B,), see `MixedLabels`: the loss of a clip is
    `weight * CE(label) + (1 - weight) * CE(second label)`. smoothing: the share of each label that is spread
    evenly over the K classes (Szegedy et al., 2016, section 7).
    """
    losses = F.cross_entropy(logits, labels.clamp(min=0), reduction="none", label_smoothing=smoothing)
    if mixed is not None:
        labels, weights = mixed
        second = F.cross_entropy(logits, labels.clamp(min=0), reduction="none", label_smoothing=smoothing)
        losses = torch.lerp(second, losses, weights)
    return losses * valid


def propagate_nonfinite(loss: Tensor) -> Tensor:
    """The loss itself; where it is not finite, its whole gradient becomes NaN, which all ranks see after the
    all-reduce.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)
