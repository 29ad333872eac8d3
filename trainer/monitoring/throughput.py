"""How fast, how much of it waiting, how much memory, how long still: measured, never guessed."""

import re
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Literal

import torch

from trainer.system.formatting import format_duration, format_percent

Activity = Literal["waiting", "saving", "evaluating"]

_TERA = 1e12
_PEAKS = {
    r"B200": 2250,
    r"GH200 .*": 989,
    r"H200": 989,
    r"H100 80GB HBM3": 989,  # SXM
    r"H100 NVL": 835,
    r"H100 PCIe": 756,
    r"A100[- ].*": 312,
    r"A40": 150,
    r"A10": 125,
    r"L40S": 362,
    r"L40": 181,
    r"L4": 121,
    r"V100-.*": 125,  # fp16: it has no bf16
    r"GeForce RTX 4090": 165,
    r"GeForce RTX 3090": 71,
}
"""Dense bf16 peak in TFLOP/s by the name torch gives, vendor left out; from the makers' data sheets."""


def peak_flops(gpu_name: str | None) -> float | None:
    """Dense bf16 peak of a GPU in FLOP/s; None for one not in the table, a slice of one, or a CPU."""
    if gpu_name is None or "MIG" in gpu_name:
        return None
    name = re.sub(r"^(NVIDIA|Tesla) ", "", gpu_name)
    return next((peak * _TERA for pattern, peak in _PEAKS.items() if re.fullmatch(pattern, name)), None)


@dataclass
class RunTotals:
    """What a run has spent since its first start, over all restarts; seconds are wall-clock."""

    steps: int = 0
    """Optimiser steps."""
    clips: int = 0
    """Clips trained on, over all ranks."""
    training: float = 0.0
    """Seconds in forward, backward and optimiser."""
    waiting: float = 0.0
    """Seconds without a batch."""
    saving: float = 0.0
    """Seconds that training paused for checkpoints; most of the writing goes on beside it."""
    evaluating: float = 0.0
    """Seconds measuring accuracy."""
    lost: float = 0.0
    """Seconds that restarts cost: work done again, and starting up anew."""
    starts: int = 1
    """How often the run was started; what never came to a checkpoint is not counted."""

    @classmethod
    def of(cls, totals: Mapping[str, float]) -> "RunTotals":
        """From the plain numbers of any version of this program; what they lack is as at the first start."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in totals.items() if name in known})  # type: ignore[arg-type]

    @property
    def clips_per_second(self) -> float:
        """Clips per second of training and waiting, saving and evaluating left out."""
        return _ratio(self.clips, self.training + self.waiting)

    @property
    def data_wait_share(self) -> float:
        """Share of the steps' time that was spent without a batch, 0..1."""
        return _ratio(self.waiting, self.training + self.waiting)

    @property
    def seconds(self) -> float:
        """All of it, but for the first start-up."""
        return self.training + self.waiting + self.saving + self.evaluating + self.lost

    @property
    def ettr(self) -> float:
        """Effective training time ratio, 0..1: share of all seconds that led to progress, in steps and
        evaluations. Checkpoint pauses, restarts and work done again did not; a job's wait in a queue is not
        counted at all.
        """
        return _ratio(self.training + self.waiting + self.evaluating, self.seconds)

    @property
    def time_breakdown(self) -> str:
        """Where the time went: `3:20:00: training 91 %, waiting 4 %, saving 1 %, evaluating 4 %`, and what
        restarts cost, where there were any.
        """
        restarts = self.starts - 1
        shares = {
            "training": self.training,
            "waiting": self.waiting,
            "saving": self.saving,
            "evaluating": self.evaluating,
        }
        if restarts:
            shares[f"lost to {restarts} restart{'s' if restarts > 1 else ''}"] = self.lost
        parts = ", ".join(
            f"{name} {format_percent(_ratio(spent, self.seconds), 0)}" for name, spent in shares.items()
        )
        return f"{format_duration(self.seconds)}: {parts}"


@dataclass(frozen=True)
class Rates:
    """How it goes at the moment: means over the latest steps."""

    clips_per_second: float
    """Over all ranks."""
    data_wait_share: float
    """Share of the time spent without a batch, 0..1."""
    seconds_per_step: float
    """Waiting included."""
    memory_peak: int
    """Bytes: the most that the GPU's allocator has held, or the process's largest resident set."""
    mfu: float | None
    """Model FLOPs per second as a share of the GPUs' dense bf16 peak; None where the peak is not known."""
    tflops_per_device: float | None = None
    """Model TFLOP/s of one device; None where the FLOPs of a clip are not known."""


class ThroughputMeter:
    """Clocks of one rank.

    with meter.step(clips):
        with meter.waiting():
            batch = next(batches)
        ...
    """

    def __init__(
        self,
        *,
        device: torch.device,
        world_size: int = 1,
        flops_per_clip: float | None = None,
        window: int = 50,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            device: whose memory to look at, and whose peak the utilisation refers to.
            world_size: devices that share the work.
            flops_per_clip: floating-point operations of one training step per clip; None leaves out MFU.
            window: optimiser steps that rates are averaged over.
            clock: seconds from any beginning; monotonic, so that setting the machine's time changes nothing.
        """
        self.spent = RunTotals()
        self._device = device
        self._clock = clock
        self._window: deque[tuple[int, float, float]] = deque(maxlen=window)
        gpu_name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        peak = peak_flops(gpu_name)
        self._world_size = world_size
        self._flops_per_clip = flops_per_clip
        self._seconds_before = self._device_seconds_before = 0.0  # of earlier starts
        self._clips_per_second_at_peak = (
            peak * world_size / flops_per_clip if peak is not None and flops_per_clip else None
        )

    @contextmanager
    def step(self, clips: int) -> Iterator[None]:
        """Time an optimiser step of `clips` over all ranks; what is no waiting inside is training."""
        start, waited_before = self._clock(), self.spent.waiting
        yield
        waited = self.spent.waiting - waited_before
        trained = self._clock() - start - waited
        self.spent.steps += 1
        self.spent.clips += clips
        self.spent.training += trained
        self._window.append((clips, waited, trained))

    def waiting(self) -> AbstractContextManager[None]:
        """Time a wait for a batch."""
        return self._spend("waiting")

    def saving(self) -> AbstractContextManager[None]:
        """Time a pause for a checkpoint."""
        return self._spend("saving")

    def evaluating(self) -> AbstractContextManager[None]:
        """Time a measurement of accuracy."""
        return self._spend("evaluating")

    @contextmanager
    def _spend(self, activity: Activity) -> Iterator[None]:
        start = self._clock()
        yield
        setattr(self.spent, activity, getattr(self.spent, activity) + self._clock() - start)

    def rates(self) -> Rates:
        """Means over the window; zeros before the first step."""
        clips = sum(entry[0] for entry in self._window)
        waited = sum(entry[1] for entry in self._window)
        seconds = waited + sum(entry[2] for entry in self._window)
        clips_per_second = _ratio(clips, seconds)
        return Rates(
            clips_per_second=clips_per_second,
            data_wait_share=_ratio(waited, seconds),
            seconds_per_step=_ratio(seconds, len(self._window)),
            memory_peak=memory_peak(self._device),
            mfu=self.mfu(clips_per_second),
            tflops_per_device=None
            if self._flops_per_clip is None
            else clips_per_second * self._flops_per_clip / self._world_size / _TERA,
        )

    def mfu(self, clips_per_second: float) -> float | None:
        """Model FLOP utilisation at this speed over all ranks, 0..1; None where no GPU's peak is known."""
        at_peak = self._clips_per_second_at_peak
        return None if at_peak is None else clips_per_second / at_peak

    @property
    def device_seconds(self) -> float:
        """Seconds spent times the ranks that spent them, over all starts."""
        own = self.spent.seconds - self._seconds_before
        return self._device_seconds_before + own * self._world_size

    def time_left(self, steps_left: int) -> float:
        """Seconds for so many steps at the present pace, evaluations and checkpoints not counted."""
        return steps_left * self.rates().seconds_per_step

    def totals(self) -> dict[str, float]:
        """What was spent since the run's first start, as plain numbers for a checkpoint."""
        return {**asdict(self.spent), "device_seconds": self.device_seconds}

    def restore(
        self,
        totals: Mapping[str, float],
        *,
        done_again: float = 0.0,
        device_done_again: float | None = None,
        restarts: bool = True,
    ) -> None:
        """Go on counting where a checkpoint stopped, as one start more where the training `restarts`.

        totals: see `Totals.of`. done_again: seconds of work after that checkpoint, which an earlier start did
        in vain. Taken from a wall clock that was set back, they may be negative, and then do not count.
        device_done_again: the same times the ranks of that start; None takes the ranks of now.
        """
        self.spent = RunTotals.of(totals)
        # A checkpoint of an earlier version does not say on how many ranks.
        self._device_seconds_before = totals.get("device_seconds", self.spent.seconds * self._world_size)
        if restarts:
            done_again = max(0.0, done_again)
            self.spent.starts += 1
            self.spent.lost += done_again
            on_devices = done_again * self._world_size if device_done_again is None else device_done_again
            self._device_seconds_before += max(0.0, on_devices)
        self._seconds_before = self.spent.seconds

    def record_startup(self, starting: float) -> None:
        """The first step is about to begin, so many seconds after its process; lost where it is a restart."""
        if self.spent.starts > 1:
            self.spent.lost += starting


def memory_peak(device: torch.device) -> int:
    """Bytes: the most the GPU's allocator has held so far, or this process's largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _ratio(amount: float, whole: float) -> float:
    return amount / whole if whole else 0.0
