"""An AdamW that can be kept from its step, where DeepSpeed would apply a gradient that is not finite."""

from collections.abc import Callable
from typing import Any

import torch


class GuardedAdamW(torch.optim.AdamW):
    """may_step: asked before each step, and the same on all ranks. held_back: whether it said no since this
    was last set to False.
    """

    may_step: Callable[[], bool]
    held_back = False

    def step(self, closure: Any = None) -> Any:
        if not self.may_step():
            self.held_back = True
            return None
        return super().step(closure)
