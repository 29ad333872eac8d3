"""Whether an exported file computes what the model computes: compared before the file is kept."""

from collections.abc import Callable

import torch
from torch import Tensor

from models import UniFormerV2, UniFormerV2Config
from trainer.errors import RunError

TOLERANCE = 1e-4
"""The most by which a logit may differ."""
BATCHES = (1, 3)
"""Clips in a batch: neither is what the model was traced with."""
TRACED_BATCH = 2  # torch.export takes 0 and 1 to be constants


def random_clips(config: UniFormerV2Config, count: int) -> Tensor:  # B 3 T H W
    """Clips of normalised noise, the same every time."""
    generator = torch.Generator().manual_seed(count)
    shape = (count, 3, config.frames, config.resolution, config.resolution)
    return torch.randn(shape, generator=generator)


def check_agreement(model: UniFormerV2, exported: Callable[[Tensor], Tensor], what: str) -> float:
    """The largest difference of a logit over the batches, at most TOLERANCE.

    exported: clips to logits. what: the format, for the message. Raises RunError where they differ by more.
    """
    difference = 0.0
    for count in BATCHES:
        clips = random_clips(model.config, count)
        with torch.no_grad():
            wanted, found = model(clips), exported(clips)
        if found.shape != wanted.shape:
            raise RunError(f"the {what} gives {tuple(found.shape)} logits, the model {tuple(wanted.shape)}")
        # NaN is no agreement either.
        difference = max(difference, (found - wanted).abs().nan_to_num(nan=torch.inf).max().item())
    if difference > TOLERANCE:
        raise RunError(
            f"the {what} differs from the model by {difference:.2g} in a logit, above {TOLERANCE:g}, and is "
            "not kept; other versions of torch or onnx may export it rightly"
        )
    return difference
