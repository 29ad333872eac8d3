"""Compares the logits of an exported file with those of the model."""

from collections.abc import Callable

import torch
from torch import Tensor

from models import UniFormerV2, UniFormerV2Config
from trainer.errors import RunError

TOLERANCE = 1e-4
"""Largest allowed difference of a logit."""
BATCHES = (1, 3)
"""Batch sizes of the comparison, different from the traced one."""
TRACED_BATCH = 2  # torch.export treats 0 and 1 as constants


def random_clips(config: UniFormerV2Config, count: int) -> Tensor:  # B 3 T H W
    """Clips of normalised noise, the same in each call."""
    generator = torch.Generator().manual_seed(count)
    shape = (count, 3, config.frames, config.resolution, config.resolution)
    return torch.randn(shape, generator=generator)


def check_agreement(model: UniFormerV2, exported: Callable[[Tensor], Tensor], what: str) -> float:
    """The largest difference of a logit over the batches.

    exported: function from clips to logits. what: the format, for the message. Raises RunError if the
    difference is above TOLERANCE.
    """
    difference = 0.0
    for count in BATCHES:
        clips = random_clips(model.config, count)
        with torch.no_grad():
            wanted, found = model(clips), exported(clips)
        if found.shape != wanted.shape:
            raise RunError(f"the {what} gives {tuple(found.shape)} logits, the model {tuple(wanted.shape)}")
        # NaN counts as an infinite difference.
        difference = max(difference, (found - wanted).abs().nan_to_num(nan=torch.inf).max().item())
    if difference > TOLERANCE:
        raise RunError(
            f"the {what} differs from the model by {difference:.2g} in a logit, above {TOLERANCE:g}, and was "
            "deleted; try another version of torch or onnx"
        )
    return difference
