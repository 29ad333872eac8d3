"""Numbers on their way from the device to the host."""

import torch
from torch import Tensor


class AsyncCopy:
    """A copy of a small tensor on the host, queued now: queued when it is read, it would stand behind all
    that the device has been given to do meanwhile.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._arrived: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def values(self) -> Tensor:
        """The copy, waited for; on a CPU the tensor itself."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values
