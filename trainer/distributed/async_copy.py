"""Device-to-host copies that are started early and read later."""

import torch
from torch import Tensor


class AsyncCopy:
    """A device-to-host copy of a small tensor, started now, so that reading it later does not wait behind
    newer GPU work.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._done: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def values(self) -> Tensor:
        """Wait for the copy and return it; on a CPU the tensor itself."""
        if self._done is not None:
            self._done.synchronize()
        return self._values
