"""Every contender on every workload, round after round, each time in a fresh process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pipelines.benchmark.task import BenchmarkTask, TaskResult
from pipelines.benchmark.workload import Workload
from pipelines.errors import DataError

WARM_UP = 3.0  # seconds at least
START_UP = 9.0  # seconds that a process takes until it is warm, besides: for the estimate
TIMEOUT = 180.0  # seconds that a contender may take beyond what is measured


@dataclass(frozen=True)
class LoaderMeasurement:
    """What one contender did in one round. repeat: counted from 0."""

    loader: str
    workload: Workload
    repeat: int
    result: TaskResult


def choose_cores(count: int | None) -> tuple[int, ...]:
    """The numbers of the first `count` cores that this process may run on; all of them for None.

    Raises:
        DataError: there are not so many.
    """
    usable = sorted(os.sched_getaffinity(0))
    if count is not None and not 1 <= count <= len(usable):
        raise DataError(f"--cores {count}: this process may run on 1 to {len(usable)} cores")
    return tuple(usable[:count])


def estimate_seconds(measurements: int, seconds: float) -> float:
    """Seconds that so many measurements of `seconds` each take, about."""
    return measurements * (seconds + WARM_UP + START_UP)


def measure_all(
    loaders: Sequence[str],
    workloads: Sequence[Workload],
    repeats: int,
    seconds: float,
    cores: tuple[int, ...],
    progress: Callable[[int, int], None],
) -> Iterator[LoaderMeasurement]:
    """Measure all, `repeats` times; a contender that has a problem is reported once and left out afterwards.

    Contenders take turns on a workload, so that what else the machine does meets them alike, and begin with
    another one each round.

    Args:
        seconds: measured each time, after a warm-up.
        cores: numbers of the cores that a contender is bound to.
        progress: called after each measurement with the number done, and of all.
    """
    total = repeats * len(workloads) * len(loaders)
    done = 0
    left_out: set[str] = set()
    progress(0, total)
    for repeat in range(repeats):
        turn = repeat % len(loaders)
        for workload in workloads:
            for loader in (*loaders[turn:], *loaders[:turn]):
                if loader not in left_out:
                    task = BenchmarkTask(loader, workload, cores, WARM_UP, seconds)
                    result = measure_in_subprocess(task)
                    if result.problem:
                        left_out.add(loader)
                    yield LoaderMeasurement(loader, workload, repeat, result)
                done += 1
                progress(done, total)


def measure_in_subprocess(task: BenchmarkTask) -> TaskResult:
    """Measure one contender in a new interpreter; its processes end with it, at once or within seconds."""
    command = [sys.executable, "-m", f"{__package__}.task", task.to_json()]
    # A session of its own: Ctrl-C reaches this process alone, which then ends the other.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=task.warm_up + task.seconds + TIMEOUT)
    except subprocess.TimeoutExpired:
        return TaskResult(problem=f"gave no clips for {TIMEOUT:.0f} seconds")
    finally:
        process.kill()
        process.wait()
    if process.returncode != 0:
        last = (errors.strip().splitlines() or ["no message"])[-1]
        return TaskResult(problem=f"ended with code {process.returncode}: {last}")
    return TaskResult(**json.loads(output.strip().splitlines()[-1]))
