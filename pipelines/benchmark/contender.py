"""One contender, measured in a process of its own: `python -m pipelines.benchmark.contender TASK`.

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

from pipelines.benchmark.cpu_usage import busy_seconds, usage
from pipelines.benchmark.libraries import NotInstalled, require
from pipelines.benchmark.workload import Workload
from pipelines.errors import DataError

OURS = "this loader"
AHEAD = 4  # batches per core that nobody makes ahead: after so many, none of those begun at first is left


@dataclass(frozen=True)
class Task:
    """What to measure.

    contender: OURS or a rival's name. cores: to run on, by their numbers, with a worker process for each.
    warm_up, seconds: to wait before, and to measure.
    """

    contender: str
    workload: Workload
    cores: tuple[int, ...]
    warm_up: float
    seconds: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Task":
        fields = json.loads(text)
        fields |= {"workload": Workload(**fields["workload"]), "cores": tuple(fields["cores"])}
        return cls(**fields)


@dataclass(frozen=True)
class Outcome:
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


def measure(task: Task) -> Outcome:
    """Open the contender's loader on the task's cores, warm it up, and count what it makes.

    Raises DataError for a manifest or videos that cannot be used, NotInstalled for a missing library.
    """
    os.sched_setaffinity(0, task.cores)  # first: threads keep to the cores of the one that starts them
    opened, spent = _open(task)
    with closing(opened) as batches:
        warm = time.monotonic() + task.warm_up
        for count, _ in enumerate(batches, start=1):
            if count >= AHEAD * len(task.cores) and time.monotonic() >= warm:
                break
        begin, used_before, spent_before = time.monotonic(), usage(), spent()
        busy_before = busy_seconds(task.cores)
        clips = 0
        for batch in batches:
            clips += len(batch)
            seconds = time.monotonic() - begin
            if seconds >= task.seconds:
                break
        used, spent_now = usage() - used_before, spent() - spent_before
        busy = busy_seconds(task.cores) - busy_before
    if task.contender == OURS:
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
    return Outcome(clips, seconds, stages, others)


@dataclass(frozen=True)
class Known:
    """CPU seconds so far of the stages that a loader counts itself; nothing for a rival."""

    decode: float = 0.0
    augment: float = 0.0

    def __sub__(self, earlier: "Known") -> "Known":
        return Known(self.decode - earlier.decode, self.augment - earlier.augment)


def _open(task: Task) -> tuple[Generator[Any, None, None], Callable[[], Known]]:
    """Batches of clips, (B, 3, T, size, size), without end; and what they have cost so far."""
    if task.contender == OURS:
        from pipelines.benchmark.this_loader import good_clips, open_loader

        loader = open_loader(task.workload, len(task.cores))

        def spent() -> Known:
            costs = loader.costs
            return Known(costs.decode, costs.augment)

        return good_clips(loader, task.workload), spent
    require("torchvision.transforms.v2", "torchvision")  # all rivals augment with it
    from pipelines.benchmark.torch_dataloaders import open_rival

    batches = open_rival(task.contender, task.workload, len(task.cores))
    return (clips for clips, _ in batches), Known


def main() -> None:
    try:
        outcome = measure(Task.from_json(sys.argv[1]))
    except (DataError, NotInstalled) as error:
        outcome = Outcome(problem=str(error))
    print(json.dumps(asdict(outcome)), flush=True)


if __name__ == "__main__":
    main()
