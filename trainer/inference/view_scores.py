"""The scores of videos from their views, with a bounded number of views per forward pass."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from models import UniFormerV2Config
from models.cost import clips_per_forward
from trainer.errors import RunError
from trainer.system.device import Precision


def view_scores(
    forward: Callable[[Tensor], Tensor], clips: Tensor, at_once: int, *, reduce_by: str
) -> Tensor:
    """Mean softmax of each video's views: (B, V, 3, T, H, W) → (B, K).

    forward: (N, 3, T, H, W) → logits (N, K). at_once: the most views of a forward pass. How many passes there
    are depends on the shape only: of a partitioned model, all ranks need the same number. reduce_by: what the
    user may do where memory runs out.

    Raises RunError where the device's memory runs out.
    """
    videos, views = clips.shape[:2]
    passes = math.ceil(videos * views / at_once)
    try:
        shares = [forward(part).softmax(dim=-1) for part in clips.flatten(0, 1).chunk(passes)]
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"out of memory with {videos} videos of {views} views, at most {at_once} views per forward pass: "
            f"{str(error).splitlines()[0]} {reduce_by}"
        ) from error
    return torch.cat(shares).unflatten(0, (videos, views)).mean(dim=1)


def views_at_once(config: UniFormerV2Config, device: torch.device, precision: Precision) -> int:
    """Views per forward pass, see `clips_per_forward`."""
    element = 4 if precision == "fp32" else 2
    return clips_per_forward(config, on_cpu=device.type == "cpu", bytes_per_element=element)
