"""What a model computes in, with DeepSpeed or without."""

import torch
from torch import Tensor, nn

from trainer.engine.memory_estimate import Precision


def compute_logits(
    precision: Precision, model: nn.Module, clips: Tensor, keys: Tensor | None = None
) -> Tensor:  # B 3 T H W, B -> B K
    """Logits in float32.

    precision: `bf16`, for a model whose weights are; `autocast`, bf16 products of weights in float32; `fp32`.
    """
    clips = clips.to(torch.bfloat16) if precision == "bf16" else clips
    with torch.autocast(clips.device.type, torch.bfloat16, enabled=precision == "autocast"):
        return model(clips, keys).float()
