"""Wall and CPU seconds of repeated work, and the most memory that it takes."""

import ctypes
import gc
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from pipelines.benchmark.cpu_usage import read_busy_seconds, read_cpu_usage

_LIBC = ctypes.CDLL(None)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MAPPED = 2**16
_LARGEST_THRESHOLD = 2**25
"""To which glibc raises its own threshold by and by, with twice as much for `M_TRIM_THRESHOLD`."""


@dataclass(frozen=True)
class Cost:
    """What one run of some work took."""

    seconds: float
    """Wall time."""
    cpu: float
    """CPU seconds of this process, with all its threads."""


class OtherPrograms:
    """Counts the cores that other programs use, of those that this process may use.

    Other programs are neither this process nor its children, the data workers.
    """

    def __init__(self) -> None:
        self._cores = os.sched_getaffinity(0)
        self._begun, self._cpu, self._busy = self._read()

    def cores(self) -> float:
        """Mean since this object was made; the kernel counts in hundredths of a second."""
        begun, cpu, busy = self._read()
        others = busy - self._busy - (cpu - self._cpu)
        return max(0.0, others) / (begun - self._begun)

    def _read(self) -> tuple[float, float, float]:
        usage, ended = read_cpu_usage(), resource.getrusage(resource.RUSAGE_CHILDREN)
        own = usage.own + usage.workers + ended.ru_utime + ended.ru_stime
        return time.perf_counter(), own, read_busy_seconds(self._cores)


def measure_cost(work: Callable[[], object], device: torch.device) -> Cost:
    """The cost of one run of `work`, waiting for the device before and after it."""
    _wait(device)
    begun, cpu = time.perf_counter(), time.process_time()
    work()
    _wait(device)
    return Cost(time.perf_counter() - begun, time.process_time() - cpu)


def measure_costs(work: Callable[[], object], device: torch.device, seconds: float) -> list[Cost]:
    """The costs of repeated runs for about so many seconds, at least one, after one that does not count."""
    work()
    costs: list[Cost] = []
    begun = time.perf_counter()
    while not costs or time.perf_counter() - begun + costs[-1].seconds < seconds:
        costs.append(measure_cost(work, device))
    return costs


@contextmanager
def mapped_tensors() -> Iterator[None]:
    """A context in which glibc maps each allocation of 64 KiB or more for itself.

    A tensor that is freed then leaves the process at once. On the heap it would leave a hole, which stays
    resident where no later tensor fits. Page faults make all work slower.
    """
    _LIBC.mallopt(_M_MMAP_THRESHOLD, _MAPPED)
    try:
        yield
    finally:
        _LIBC.mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        _LIBC.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_THRESHOLD)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most memory that `work` takes beyond what was allocated before: tensors of a GPU, or the resident
    set of this process, in bytes.

    On a CPU this is that of the tensors that live at the same time only if all the process did was done in
    `mapped_tensors`: else there are holes on the heap, and `work` fills them.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _LIBC.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (kib,) = [int(line.split()[1]) for line in lines if line.startswith(f"{name}:")]
    return 1024 * kib


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
