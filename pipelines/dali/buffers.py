"""DALI's buffers while torch works on them."""

from collections import deque

import torch

MOST = 2  # batches that may be waited for: the trainer runs about one ahead of the GPU


class InUseBuffers:
    """Keeps each batch's buffer until torch's stream has done what was queued with it.

    A tensor made of DALI's buffer gives it back when it is dropped, and DALI's next operation takes it
    without waiting for torch. On a CPU work is done when it was queued, and nothing is kept.
    """

    def __init__(self) -> None:
        self._latest: torch.Tensor | None = None
        self._at_work: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()

    def release_finished(self) -> None:
        """To be called when all work with the latest batch has been queued."""
        if self._latest is not None:
            event = torch.cuda.Event()
            event.record()
            self._at_work.append((self._latest, event))
            self._latest = None
        while self._at_work:
            _, event = self._at_work[0]
            if len(self._at_work) > MOST:
                event.synchronize()
            elif not event.query():
                return
            self._at_work.popleft()

    def release(self) -> None:
        """Wait for the work with all batches, and give their buffers back."""
        if self._latest is not None:
            torch.cuda.synchronize(self._latest.device)
        self._latest = None
        self._at_work.clear()

    def hold(self, clips: torch.Tensor) -> None:
        """Take note of the batch that is handed over now."""
        if clips.is_cuda:
            self._latest = clips
