"""Measures one loader in its own process: `python -m pipelines.benchmark.task TASK`.

TASK is JSON, and so is the result, the last line of stdout. DALI's worker processes import this file again,
so functions import what is slow to import.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.benchmark.cpu_usage import read_busy_seconds, read_cpu_usage
from pipelines.benchmark.libraries import LibraryUnavailable, require_library
from pipelines.benchmark.workload import Workload
from pipelines.errors import DataError

THIS_LOADER = "this loader"
WARM_UP_BATCHES = 4  # per core; no loader prefetches so many, so all later batches began after the warm-up


@dataclass(frozen=True)
class BenchmarkTask:
    """One measurement of one loader on one workload."""

    loader: str
    """`THIS_LOADER`, or a key of `torch_dataloaders.VIDEO_READERS`."""
    workload: Workload
    """The clips to make."""
    cores: tuple[int, ...]
    """Numbers of the cores to run on; the loader has one worker process for each."""
    warm_up: float
    """Seconds to run before the measurement, at least."""
    seconds: float
    """Seconds to measure."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "BenchmarkTask":
        fields = json.loads(text)
        fields |= {"workload": Workload(**fields["workload"]), "cores": tuple(fields["cores"])}
        return cls(**fields)


@dataclass(frozen=True)
class TaskResult:
    """Clips made in the measured time, and their CPU time."""

    clips: int = 0
    """Clips made."""
    seconds: float = 0.0
    """Wall-clock seconds measured."""
    stages: dict[str, float] = field(default_factory=dict)
    """CPU seconds by stage; they sum to all that the loader used. "hand over" is what worker processes do
    beside decoding: reading files, drawing parameters, copying frames to the main process."""
    others: float = 0.0
    """CPU seconds that other programs used on the same cores."""
    problem: str = ""
    """Why nothing was measured; empty on success."""

    @property
    def rate(self) -> float:
        """Clips per second."""
        return self.clips / self.seconds

    @property
    def cpu(self) -> float:
        """CPU seconds of all stages."""
        return sum(self.stages.values())

    def per_clip(self) -> dict[str, float]:
        """CPU milliseconds per clip of each stage."""
        return {name: 1000 * seconds / self.clips for name, seconds in self.stages.items()}


def measure_loader(task: BenchmarkTask) -> TaskResult:
    """Open the loader on the task's cores, warm it up, and count its clips.

    Raises DataError for an unusable manifest or video, LibraryUnavailable for a missing library.
    """
    os.sched_setaffinity(0, task.cores)  # before any thread starts: threads inherit the cores
    opened, read_stages = _open(task)
    with closing(opened) as batches:
        warm = time.monotonic() + task.warm_up
        for count, _ in enumerate(batches, start=1):
            if count >= WARM_UP_BATCHES * len(task.cores) and time.monotonic() >= warm:
                break
        begin, used_before, stages_before = time.monotonic(), read_cpu_usage(), read_stages()
        busy_before = read_busy_seconds(task.cores)
        clips = 0
        for batch in batches:
            clips += len(batch)
            seconds = time.monotonic() - begin
            if seconds >= task.seconds:
                break
        used = read_cpu_usage() - used_before
        decode, augment = (now - before for now, before in zip(read_stages(), stages_before, strict=True))
        busy = read_busy_seconds(task.cores) - busy_before
    if task.loader == THIS_LOADER:
        # The loader reports decoding with the finished batch, and the kernel counts thread time in ticks.
        # Over a short time either can exceed the process total.
        decode, augment = min(decode, used.workers), min(augment, used.own)
        stages = {
            "decode": decode,
            "hand over": used.workers - decode,
            "augment": augment,
            "rest": used.own - augment,
        }
    else:
        stages = {"workers": used.workers, "rest": used.own}
    others = max(0.0, busy - sum(stages.values()))
    return TaskResult(clips, seconds, stages, others)


def _open(task: BenchmarkTask) -> tuple[Generator[Any, None, None], Callable[[], tuple[float, float]]]:
    """An endless iterator of batches, (B, 3, T, size, size), and a function that reads their CPU seconds of
    decoding and augmentation so far, which only this loader counts."""
    if task.loader == THIS_LOADER:
        from pipelines.benchmark.clip_loader import open_loader, valid_clips

        loader = open_loader(task.workload, len(task.cores))
        return valid_clips(loader, task.workload), lambda: (loader.costs.decode, loader.costs.augment)
    require_library("torchvision.transforms.v2", "torchvision")  # all baseline loaders augment with it
    from pipelines.benchmark.torch_dataloaders import open_dataloader

    batches = open_dataloader(task.loader, task.workload, len(task.cores))
    return (clips for clips, _ in batches), lambda: (0.0, 0.0)


def main() -> None:
    try:
        result = measure_loader(BenchmarkTask.from_json(sys.argv[1]))
    except (DataError, LibraryUnavailable) as error:
        result = TaskResult(problem=str(error))
    print(json.dumps(asdict(result)), flush=True)


if __name__ == "__main__":
    main()
