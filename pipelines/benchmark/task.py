"""One contender, measured in a process of its own: `python -m pipelines.benchmark.task TASK`.

TASK and what is printed, the last line of stdout, are JSON. DALI's worker processes import this file again:
what is heavy is imported inside functions.
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
WARM_UP_BATCHES = (
    4  # batches per core that nobody makes ahead: after so many, none of those begun at first is left
)


@dataclass(frozen=True)
class BenchmarkTask:
    """What to measure.

    contender: OURS or a rival's name. cores: to run on, by their numbers, with a worker process for each.
    warm_up, seconds: to wait before, and to measure.
    """

    loader: str
    workload: Workload
    cores: tuple[int, ...]
    warm_up: float
    seconds: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "BenchmarkTask":
        fields = json.loads(text)
        fields |= {"workload": Workload(**fields["workload"]), "cores": tuple(fields["cores"])}
        return cls(**fields)


@dataclass(frozen=True)
class TaskResult:
    """What was measured: clips made in so many seconds.

    stages: CPU seconds that went into them, by name; together all that the contender used. "hand over" is
    what worker processes do beside decoding: reading files and draws, and copying frames to the main process.
    others: CPU seconds that these cores worked for somebody else meanwhile. problem: why nothing was
    measured, in words; empty if all went well.
    """

    clips: int = 0
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    others: float = 0.0
    problem: str = ""

    @property
    def rate(self) -> float:
        """Clips per second."""
        return self.clips / self.seconds

    @property
    def cpu(self) -> float:
        """CPU seconds of everything."""
        return sum(self.stages.values())

    def per_clip(self) -> dict[str, float]:
        """CPU milliseconds a clip of each stage."""
        return {name: 1000 * seconds / self.clips for name, seconds in self.stages.items()}


def measure(task: BenchmarkTask) -> TaskResult:
    """Open the contender's loader on the task's cores, warm it up, and count what it makes.

    Raises DataError for a manifest or videos that cannot be used, NotInstalled for a missing library.
    """
    os.sched_setaffinity(0, task.cores)  # first: threads keep to the cores of the one that starts them
    opened, spent = _open(task)
    with closing(opened) as batches:
        warm = time.monotonic() + task.warm_up
        for count, _ in enumerate(batches, start=1):
            if count >= WARM_UP_BATCHES * len(task.cores) and time.monotonic() >= warm:
                break
        begin, used_before, spent_before = time.monotonic(), read_cpu_usage(), spent()
        busy_before = read_busy_seconds(task.cores)
        clips = 0
        for batch in batches:
            clips += len(batch)
            seconds = time.monotonic() - begin
            if seconds >= task.seconds:
                break
        used, spent_now = read_cpu_usage() - used_before, spent() - spent_before
        busy = read_busy_seconds(task.cores) - busy_before
    if task.loader == THIS_LOADER:
        # Decoding is told with its batch, a little after it was done, and the time of threads in ticks of the
        # kernel: over a short time either can be more than the whole that it is part of.
        decode, augment = min(spent_now.decode, used.workers), min(spent_now.augment, used.own)
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


@dataclass(frozen=True)
class StageSeconds:
    """CPU seconds so far of the stages that a loader counts itself; nothing for a rival."""

    decode: float = 0.0
    augment: float = 0.0

    def __sub__(self, earlier: "StageSeconds") -> "StageSeconds":
        return StageSeconds(self.decode - earlier.decode, self.augment - earlier.augment)


def _open(task: BenchmarkTask) -> tuple[Generator[Any, None, None], Callable[[], StageSeconds]]:
    """Batches of clips, (B, 3, T, size, size), without end; and what they have cost so far."""
    if task.loader == THIS_LOADER:
        from pipelines.benchmark.clip_loader import open_loader, valid_clips

        loader = open_loader(task.workload, len(task.cores))

        def spent() -> StageSeconds:
            costs = loader.costs
            return StageSeconds(costs.decode, costs.augment)

        return valid_clips(loader, task.workload), spent
    require_library("torchvision.transforms.v2", "torchvision")  # all rivals augment with it
    from pipelines.benchmark.torch_dataloaders import open_dataloader

    batches = open_dataloader(task.loader, task.workload, len(task.cores))
    return (clips for clips, _ in batches), StageSeconds


def main() -> None:
    try:
        result = measure(BenchmarkTask.from_json(sys.argv[1]))
    except (DataError, LibraryUnavailable) as error:
        result = TaskResult(problem=str(error))
    print(json.dumps(asdict(result)), flush=True)


if __name__ == "__main__":
    main()
