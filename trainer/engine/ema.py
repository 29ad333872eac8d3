"""An exponential moving average of the weights, partitioned as the optimiser's states are."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from trainer.engine.state_shards import StateShard

AVERAGED = ("weight/", "buffer/")


class Ema:
    """average = d * average + (1 - d) * weights after each step, with d = min(decay, (1 + n) / (10 + n))
    after n steps: a long average of few steps would be mostly the initial weights.

    Batch norms' running statistics are averaged likewise, so that they fit the averaged weights.
    """

    def __init__(
        self, pieces: list[StateShard], decay: float, after_step: Mapping[str, Tensor] = MappingProxyType({})
    ) -> None:
        """pieces: what this rank holds of the training state; the average begins as what they hold now.

        after_step: by a piece's key, what holds its values as they were after the last step, where the piece
        itself may have changed since.
        """
        averaged = [piece for piece in pieces if _is_averaged(piece)]
        self._decay = decay
        self._live = [piece.values for piece in averaged]
        self._after_step = [after_step.get(piece.key, piece.values) for piece in averaged]
        self.shards = [
            replace(piece, key=f"average/{piece.key}", values=piece.values.float().clone())
            for piece in averaged
        ]
        self._values = [piece.values for piece in self.shards]

    def update(self, steps: int) -> None:
        """Take in the weights after so many steps."""
        decay = min(self._decay, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(self._values, [values.float() for values in self._after_step], 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the pieces hold the average; the caller makes the model's weights follow."""
        kept = [live.clone() for live in self._live]
        torch._foreach_copy_(self._live, self._values)
        try:
            yield
        finally:
            torch._foreach_copy_(self._live, kept)


def _is_averaged(piece: StateShard) -> bool:
    return piece.key.startswith(AVERAGED) and piece.values.is_floating_point()
