"""DALI's output buffers, held while torch works on them."""

from collections import deque

import torch

MOST = 2  # batches in use: the trainer queues about one ahead of the GPU


class InUseBuffers:
    """Holds each batch's buffer until torch's stream has done the work queued with it.

    A tensor made of DALI's buffer returns it when the tensor is freed, and DALI's next operation writes to it
    without waiting for torch. On a CPU the work is done as soon as it is queued, so nothing is held.
    """

    def __init__(self) -> None:
        self._latest: torch.Tensor | None = None
        self._queued: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()

    def hold(self, clips: torch.Tensor) -> None:
        """Hold the buffer of the batch that is now in use."""
        if clips.is_cuda:
            self._latest = clips

    def release_finished(self) -> None:
        """Release buffers whose work is done. To be called when all work with the latest one is queued."""
        if self._latest is not None:
            event = torch.cuda.Event()
            event.record()
            self._queued.append((self._latest, event))
            self._latest = None
        while self._queued:
            _, event = self._queued[0]
            if len(self._queued) > MOST:
                event.synchronize()
            elif not event.query():
                return
            self._queued.popleft()

    def release_all(self) -> None:
        """Wait for the work with all batches, and release their buffers."""
        if self._latest is not None:
            torch.cuda.synchronize(self._latest.device)
        self._latest = None
        self._queued.clear()
