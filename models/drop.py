"""Drop-path: whole residual branches left out, clip by clip."""

from torch import Tensor, nn


class DropPath(nn.Module):
    """Zeroes a branch for each clip with probability `rate` and scales the others by `1 / (1 - rate)`.

    The mean over draws is the branch itself; in evaluation the branch passes unchanged. The released
    implementation keeps its tensors sequence-first and therefore drops token positions of the whole batch;
    here, as in the paper's references, it is the clip that is dropped.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:  # B ... -> B ...
        if not self.training or self.rate == 0:
            return branch
        keep = 1 - self.rate
        mask = branch.new_empty(branch.shape[0], *[1] * (branch.dim() - 1))  # B 1 ...
        return branch * mask.bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


def linear_rates(last: float, count: int) -> list[float]:
    """`count` rates that grow linearly from 0 to `last`."""
    return [last * index / max(count - 1, 1) for index in range(count)]
