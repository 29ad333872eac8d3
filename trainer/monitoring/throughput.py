"""Throughput, data-wait share, memory, MFU and remaining time of a run."""

import re
import resource
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Literal

import torch

from trainer.system.formatting import format_duration, format_percent

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
"""Dense bf16 peak in TFLOP/s by torch's name of the GPU without the vendor; from data sheets."""


def peak_flops(gpu_name: str | None) -> float | None:
    """Dense bf16 peak of a GPU in FLOP/s; None for an unknown GPU, a MIG slice or a CPU."""
    if gpu_name is None or "MIG" in gpu_name:
        return None
    name = re.sub(r"^(NVIDIA|Tesla) ", "", gpu_name)
    return next((peak * _TERA for pattern, peak in _PEAKS.items() if re.fullmatch(pattern, name)), None)


@dataclass
class RunTotals:
    """Work and wall-clock time of a run since its first start, over all restarts."""

    steps: int = 0
    """Optimiser steps."""
    clips: int = 0
    """Clips trained on, over all ranks."""
    training: float = 0.0
    """Seconds in forward, backward and optimiser."""
    waiting: float = 0.0
    """Seconds without a batch."""
    saving: float = 0.0
    """Seconds that training paused for checkpoints; most of the writing runs in parallel."""
    evaluating: float = 0.0
    """Seconds in evaluations."""
    lost: float = 0.0
    """Seconds lost to restarts: repeated work and start-up."""
    starts: int = 1
    """Number of starts; those that saved no checkpoint are not counted."""

    @classmethod
    def of(cls, totals: Mapping[str, float]) -> "RunTotals":
        """From the numbers in a checkpoint of any version; those that are missing have their defaults."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in totals.items() if name in known})  # type: ignore[arg-type]

    @property
    def clips_per_second(self) -> float:
        """Clips per second of training and waiting."""
        return _ratio(self.clips, self.training + self.waiting)

    @property
    def data_wait_share(self) -> float:
        """Share of the steps' time spent waiting for a batch, 0..1."""
        return _ratio(self.waiting, self.training + self.waiting)

    @property
    def seconds(self) -> float:
        """All seconds except the first start-up."""
        return self.training + self.waiting + self.saving + self.evaluating + self.lost

    @property
    def ettr(self) -> float:
        """Effective training time ratio, 0..1: the share of steps and evaluations in all seconds. The rest is
        checkpoint pauses, restarts and repeated work. Time in a job queue is not counted.
        """
        return _ratio(self.training + self.waiting + self.evaluating, self.seconds)

    @property
    def time_breakdown(self) -> str:
        """`3:20:00: training 91 %, waiting 4 %, saving 1 %, evaluating 4 %`, and the share lost to restarts,
        if there were any.
        """
        restarts = self.starts - 1
        shares = {name: getattr(self, name) for name in ("training", "waiting", "saving", "evaluating")}
        if restarts:
            shares[f"lost to {restarts} restart{'s' if restarts > 1 else ''}"] = self.lost
        parts = ", ".join(
            f"{name} {format_percent(_ratio(spent, self.seconds), 0)}" for name, spent in shares.items()
        )
        return f"{format_duration(self.seconds)}: {parts}"


@dataclass(frozen=True)
class Rates:
    """Means over the latest steps."""

    clips_per_second: float
    """Over all ranks."""
    data_wait_share: float
    """Share of the time spent waiting for a batch, 0..1."""
    seconds_per_step: float
    """Waiting included."""
    memory_peak: int
    """Bytes: the peak of the GPU's allocator, or of the process's resident set."""
    mfu: float | None
    """Model FLOPs per second as a share of the GPUs' dense bf16 peak; None where it is unknown."""
    tflops_per_device: float | None = None
    """Model TFLOP/s of one device; None where the FLOPs of a clip are unknown."""


@dataclass
class ThroughputMeter:
    """Measures the time of one rank.

    with meter.step(clips):
        with meter.time("waiting"):
            batch = next(batches)
        ...
    """

    device: torch.device
    """Whose memory and peak FLOP/s are used."""
    world_size: int = 1
    """Number of devices."""
    flops_per_clip: float | None = None
    """FLOPs of one training step per clip; None: no MFU."""
    window: int = 50
    """Optimiser steps over which rates are averaged."""
    clock: Callable[[], float] = time.perf_counter
    """Monotonic, in seconds."""

    def __post_init__(self) -> None:
        self.spent = RunTotals()
        self._window: deque[tuple[int, float, float]] = deque(maxlen=self.window)
        on_gpu = self.device.type == "cuda"
        peak = peak_flops(torch.cuda.get_device_name(self.device) if on_gpu else None)
        self._seconds_before = self._device_seconds_before = 0.0  # of earlier starts
        self._clips_per_second_at_peak = (
            peak * self.world_size / self.flops_per_clip if peak is not None and self.flops_per_clip else None
        )

    @contextmanager
    def step(self, clips: int) -> Iterator[None]:
        """Time an optimiser step of `clips` over all ranks; all but waiting counts as training."""
        start, waited_before = self.clock(), self.spent.waiting
        yield
        waited = self.spent.waiting - waited_before
        trained = self.clock() - start - waited
        self.spent.steps += 1
        self.spent.clips += clips
        self.spent.training += trained
        self._window.append((clips, waited, trained))

    @contextmanager
    def time(self, activity: Literal["waiting", "saving", "evaluating"]) -> Iterator[None]:
        """Time a wait for a batch, a pause for a checkpoint, or an evaluation."""
        start = self.clock()
        yield
        setattr(self.spent, activity, getattr(self.spent, activity) + self.clock() - start)

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
            memory_peak=memory_peak(self.device),
            mfu=self.mfu(clips_per_second),
            tflops_per_device=None
            if self.flops_per_clip is None
            else clips_per_second * self.flops_per_clip / self.world_size / _TERA,
        )

    def mfu(self, clips_per_second: float) -> float | None:
        """Model FLOP utilisation at this speed over all ranks, 0..1; None where the peak is unknown."""
        at_peak = self._clips_per_second_at_peak
        return None if at_peak is None else clips_per_second / at_peak

    @property
    def device_seconds(self) -> float:
        """Device-seconds: seconds times ranks, over all starts."""
        own = self.spent.seconds - self._seconds_before
        return self._device_seconds_before + own * self.world_size

    def time_left(self, steps_left: int) -> float:
        """Seconds for `steps_left` steps at the present rate, without evaluations and checkpoints."""
        return steps_left * self.rates().seconds_per_step

    def totals(self) -> dict[str, float]:
        """The totals since the first start, as numbers for a checkpoint."""
        return {**asdict(self.spent), "device_seconds": self.device_seconds}

    def restore(
        self,
        totals: Mapping[str, float],
        *,
        done_again: float = 0.0,
        device_done_again: float | None = None,
        restarts: bool = True,
    ) -> None:
        """Continue from the totals of a checkpoint.

        Args:
            totals: see `RunTotals.of`.
            done_again: seconds of work after that checkpoint, which is repeated. Negative values, from a wall
                clock that was set back, count as 0.
            device_done_again: the same in device-seconds; None: `done_again` times the present ranks.
            restarts: whether this is one more start of the training.
        """
        self.spent = RunTotals.of(totals)
        # Checkpoints of earlier versions have no device-seconds.
        self._device_seconds_before = totals.get("device_seconds", self.spent.seconds * self.world_size)
        if restarts:
            done_again = max(0.0, done_again)
            self.spent.starts += 1
            self.spent.lost += done_again
            on_devices = done_again * self.world_size if device_done_again is None else device_done_again
            self._device_seconds_before += max(0.0, on_devices)
        self._seconds_before = self.spent.seconds

    def record_startup(self, starting: float) -> None:
        """Count the seconds from the process's start to the first step as lost if this is a restart."""
        if self.spent.starts > 1:
            self.spent.lost += starting


def memory_peak(device: torch.device) -> int:
    """Bytes: the peak of the GPU's allocator, or of this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _ratio(amount: float, whole: float) -> float:
    return amount / whole if whole else 0.0
