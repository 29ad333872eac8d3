"""An exponential moving average (EMA) of the weights, partitioned as the optimiser's states are."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from trainer.engine.state_shards import StateShard

AVERAGED = ("weight/", "buffer/")


class Ema:
    """After step n, ema = d * ema + (1 - d) * weights, with d = min(decay, (1 + n) / (10 + n)).

    Without that limit, a long average of few steps would be mostly the initial weights. Batch norms' running
    statistics are averaged likewise, so that they fit the averaged weights.
    """

    def __init__(
        self, shards: list[StateShard], decay: float, after_step: Mapping[str, Tensor] = MappingProxyType({})
    ) -> None:
        """Args:
        shards: what this rank holds of the training state; the EMA starts from their values.
        decay: the largest d.
        after_step: by a shard's key, a tensor with its values after the last step, for shards that change
            within a step.
        """
        averaged = [
            shard for shard in shards if shard.key.startswith(AVERAGED) and shard.values.is_floating_point()
        ]
        self._decay = decay
        self._live = [shard.values for shard in averaged]
        self._after_step = [after_step.get(shard.key, shard.values) for shard in averaged]
        self.shards = [
            replace(shard, key=f"average/{shard.key}", values=shard.values.float().clone())
            for shard in averaged
        ]
        self._values = [shard.values for shard in self.shards]

    def update(self, steps: int) -> None:
        """Average in the weights after so many steps."""
        decay = min(self._decay, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(self._values, [values.float() for values in self._after_step], 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the shards of the training state hold the EMA; the caller syncs the model's weights."""
        saved = [live.clone() for live in self._live]
        torch._foreach_copy_(self._live, self._values)
        try:
            yield
        finally:
            torch._foreach_copy_(self._live, saved)
