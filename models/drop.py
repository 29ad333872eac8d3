"""Dropout and drop-path whose masks belong to the clip: what is drawn does not depend on who draws it.

A mask is a hash of the clip's key, the layer and the place in the clip's own tensor. No generator has a state
that another rank, another split into micro-batches or a recomputation would find changed.
"""

import torch
from torch import Tensor, nn

from models.config import ModelError


def mask_streams(keys: Tensor, layers: int) -> Tensor:  # B -> B layers
    """One hashed number per clip and layer, int64, uniform over all of them; `keys` are int64."""
    return _counted(_mix(keys), layers)


def _counted(hashed: Tensor, count: int) -> Tensor:  # B -> B count
    """`count` numbers from each.

    The counter is joined by xor: multiplied by an odd constant, as is usual, it would become an index whose
    overflow torch.compile's C++ does not survive.
    """
    return _mix(hashed[:, None] ^ torch.arange(count, device=hashed.device))


def _mix(value: Tensor) -> Tensor:
    """SplitMix64's output for a state: every input bit changes every output bit with a chance near one half.

    Sums and products wrap. Torch's shift keeps the sign, which the masks take away again.
    """
    value = value + (0x9E3779B97F4A7C15 - 2**64)
    value = (value ^ ((value >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    value = (value ^ ((value >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return value ^ ((value >> 31) & (2**33 - 1))


class ClipMask(nn.Module):
    """What dropout and drop-path share: a rate, a layer number, and how a hash becomes a mask.

    rate: chance of a zero; the rest is scaled by `1 / (1 - rate)`, so that the mean over keys is the input.
    layer: the column of `mask_streams` that is this module's alone, as `number_layers` deals them.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.layer = 0

    def _draws(self) -> bool:
        return self.training and self.rate > 0

    def _stream(self, streams: Tensor | None) -> Tensor:  # B layers -> B
        if streams is None:
            raise ModelError(f"{self} draws masks in training and was given no streams (see mask_streams)")
        return streams[:, self.layer]

    def _masked(self, x: Tensor, hashed: Tensor) -> Tensor:
        """`x` times the mask; `hashed` is uniform over int64, so one comparison draws."""
        kept = hashed >= round(self.rate * 2**64) - 2**63
        # In bf16 a mask of scaled ones would be off by its own rounding, the same way for every clip.
        return x * kept / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}, layer={self.layer}"


class DropPath(ClipMask):
    """Leaves a residual branch out, clip by clip.

    Whether is a function of (key of the clip, layer): one number for the whole branch. In evaluation the
    branch passes unchanged, and `streams` may be None; in training ModelError is raised without them.

    The released implementation keeps its tensors sequence-first and therefore drops token positions of the
    whole batch; here, as in the paper's references, it is the clip that is dropped.
    """

    def forward(self, branch: Tensor, streams: Tensor | None) -> Tensor:  # B ..., B layers -> B ...
        if not self._draws():
            return branch
        return self._masked(branch, self._stream(streams).view(-1, *[1] * (branch.dim() - 1)))


class Dropout(ClipMask):
    """Zeroes single elements.

    Which is a function of (key of the clip, layer, index of the element in the clip's own tensor, counted row
    after row). In evaluation all pass unchanged, and `streams` may be None; in training ModelError is raised
    without them.
    """

    def forward(self, x: Tensor, streams: Tensor | None) -> Tensor:  # B ..., B layers -> B ...
        if not self._draws():
            return x
        hashed = _counted(self._stream(streams), x.shape[1:].numel())
        return self._masked(x, hashed.view(x.shape))


def number_layers(model: nn.Module) -> int:
    """Give each `ClipMask` of the model a layer of its own, in the order of `modules()`; return how many."""
    masks = [module for module in model.modules() if isinstance(module, ClipMask)]
    for layer, module in enumerate(masks):
        module.layer = layer
    return len(masks)


def linear_rates(last: float, count: int) -> list[float]:
    """`count` rates that grow linearly from 0 to `last`."""
    return [last * index / max(count - 1, 1) for index in range(count)]
