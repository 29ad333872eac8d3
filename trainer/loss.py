"""The training loss: cross-entropy of the clips that could be read."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_cross_entropy(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:  # B K, B, B -> B
    """Cross-entropy of each clip; zero for a bad one, whose label may be -1."""
    return F.cross_entropy(logits, labels.clamp(min=0), reduction="none") * valid


def propagate_nonfinite(loss: Tensor) -> Tensor:
    """The loss itself; where it is not finite, its whole gradient becomes NaN, which all ranks see after the
    all-reduce.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)
