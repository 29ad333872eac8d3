"""An AdamW that leaves weights and moments as they are where the gradient is not finite."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class SkippableAdamW(torch.optim.AdamW):
    """is_finite: asked at each step whether the gradient is; a bool tensor without dimensions, on the device
    of the weights, the same on all ranks.

    Fused, the kernel itself looks at it, so that the host never waits for the device; the step counts do not
    advance either. Otherwise the host reads it: no other AdamW of torch can be skipped on the device.
    """

    is_finite: Callable[[], Tensor]

    def step(self, closure: Any = None) -> Any:
        finite = self.is_finite()
        if self.defaults["fused"]:
            self.found_inf = finite.logical_not().float()
        elif not finite:
            return None
        return super().step(closure)
