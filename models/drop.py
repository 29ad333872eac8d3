"""Dropout and drop-path with masks that are a function of the clip.

A mask is a hash of the clip's key, the layer and the index in the clip's own tensor. There is no generator
state, so masks do not depend on ranks, micro-batches or recomputation.
"""

import torch
from torch import Tensor, nn

from models.config import ModelError


def mask_streams(keys: Tensor, layers: int) -> Tensor:  # B -> B layers
    """One hashed number per clip and layer, uniform over int64. keys: int64, one per clip."""
    return _hash_counters(_mix(keys), layers)


def _hash_counters(hashed: Tensor, count: int) -> Tensor:  # B -> B count
    """`count` hashed numbers from each number.

    The counter is combined by xor. The usual product with an odd constant would overflow as an index in
    torch.compile's C++, which crashes.
    """
    return _mix(hashed[:, None] ^ torch.arange(count, device=hashed.device))


def _mix(value: Tensor) -> Tensor:
    """SplitMix64's output for a state: every input bit flips every output bit with probability close to 0.5.

    Sums and products wrap. The masks remove the sign bits that torch's arithmetic shift fills in.
    """
    value = value + (0x9E3779B97F4A7C15 - 2**64)
    value = (value ^ ((value >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    value = (value ^ ((value >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return value ^ ((value >> 31) & (2**33 - 1))


class ClipMask(nn.Module):
    """Base class of dropout and drop-path.

    rate: probability of a zero; other values are scaled by `1 / (1 - rate)`, so the mean over keys is the
    input. layer: this module's column of the streams that it is given, set by `number_layers`.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.layer = 0

    def _draws(self) -> bool:
        return self.training and self.rate > 0

    def _stream(self, streams: Tensor | None) -> Tensor:  # B layers -> B
        if streams is None:
            raise ModelError(f"{self} needs streams in training (see mask_streams)")
        return streams[:, self.layer]

    def _masked(self, x: Tensor, hashed: Tensor) -> Tensor:
        """`x` times the mask. hashed: uniform over int64."""
        kept = hashed >= round(self.rate * 2**64) - 2**63
        if x.dtype == torch.float32:
            # What is dropped is divided by infinity. On a CPU the bits are those of x * kept / (1 - rate).
            return x / ((1 - self.rate) / kept)
        # Dividing afterwards: in bf16, rounding 1 / (1 - rate) first would bias all clips alike.
        return x * kept / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}, layer={self.layer}"


class DropPath(ClipMask):
    """Drops a residual branch for whole clips, as a function of (key of the clip, layer).

    In evaluation the branch passes unchanged and `streams` may be None; in training None raises ModelError.

    The released implementation has sequence-first tensors and therefore drops token positions of the whole
    batch. Here clips are dropped, as in the paper's references.
    """

    def forward(self, branch: Tensor, streams: Tensor | None) -> Tensor:  # B ..., B layers -> B ...
        if not self._draws():
            return branch
        return self._masked(branch, self._stream(streams).view(-1, *[1] * (branch.dim() - 1)))


class Dropout(ClipMask):
    """Zeroes elements as a function of (key of the clip, layer, row-major index in the clip's own tensor).

    In evaluation all pass unchanged and `streams` may be None; in training None raises ModelError.
    """

    def forward(self, x: Tensor, streams: Tensor | None) -> Tensor:  # B ..., B layers -> B ...
        if not self._draws():
            return x
        hashed = _hash_counters(self._stream(streams), x.shape[1:].numel())
        return self._masked(x, hashed.view(x.shape))


class MaskedBlock(nn.Module):
    """Base class of blocks whose masks are numbered from 0 in each block.

    A block is given the columns of its own masks, see `own_streams`. Blocks that differ only in their place
    then compile to one graph: torch.compile treats a module's integers as constants.
    """

    mask_columns = slice(0)
    """Columns of `mask_streams` that belong to this block, set by `number_layers`."""


def number_layers(model: nn.Module) -> int:
    """Number the `ClipMask`s of the model in the order of `modules()`; returns their number.

    Those within a `MaskedBlock` are numbered from 0, and the block gets its columns.
    """
    masks = _masks(model)
    for layer, mask in enumerate(masks):
        mask.layer = layer
    for block in model.modules():
        if isinstance(block, MaskedBlock) and (own := _masks(block)):
            first = own[0].layer
            block.mask_columns = slice(first, first + len(own))
            for mask in own:
                mask.layer -= first
    return len(masks)


def own_streams(block: nn.Module, streams: Tensor | None) -> Tensor | None:  # B layers -> B own
    """The columns of the masks of a `MaskedBlock`, in the order of its `modules()`."""
    assert isinstance(block, MaskedBlock)
    return None if streams is None else streams[:, block.mask_columns]


def _masks(model: nn.Module) -> list[ClipMask]:
    return [module for module in model.modules() if isinstance(module, ClipMask)]


def linear_rates(last: float, count: int) -> list[float]:
    """`count` drop rates that grow linearly from 0 to `last`."""
    return [last * index / max(count - 1, 1) for index in range(count)]
