"""Measures every loader on every workload, in rounds, each time in a new process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pipelines.benchmark.task import BenchmarkTask, TaskResult
from pipelines.benchmark.workload import Workload
from pipelines.errors import DataError

WARM_UP = 3.0  # seconds, at least
START_UP = 9.0  # seconds from the start of a process to the warm-up, for the estimate
TIMEOUT = 180.0  # seconds that a loader may take beyond the measured time


@dataclass(frozen=True)
class LoaderMeasurement:
    """The result of one loader on one workload in one round."""

    loader: str
    """Its name."""
    workload: Workload
    """The clips to make."""
    repeat: int
    """The round, from 0."""
    result: TaskResult
    """Clips and CPU time, or the problem."""


def choose_cores(count: int | None) -> tuple[int, ...]:
    """The numbers of the first `count` cores that this process may run on; all of them for None.

    Raises:
        DataError: there are fewer.
    """
    usable = sorted(os.sched_getaffinity(0))
    if count is not None and not 1 <= count <= len(usable):
        raise DataError(f"--cores {count}: this process may run on 1 to {len(usable)} cores")
    return tuple(usable[:count])


def estimate_seconds(measurements: int, seconds: float) -> float:
    """Estimated duration of so many measurements of `seconds` each."""
    return measurements * (seconds + WARM_UP + START_UP)


def measure_all(
    loaders: Sequence[str],
    workloads: Sequence[Workload],
    repeats: int,
    seconds: float,
    cores: tuple[int, ...],
    progress: Callable[[int, int], None],
) -> Iterator[LoaderMeasurement]:
    """Measure all loaders on all workloads, `repeats` times.

    The loaders alternate on each workload, so that other load on the machine affects them alike, and each
    round starts with another one. A loader with a problem is reported once and skipped afterwards.

    Args:
        seconds: duration of each measurement, after a warm-up.
        cores: numbers of the cores that a loader is bound to.
        progress: called after each measurement with the numbers of those done and of all.
    """
    total = repeats * len(workloads) * len(loaders)
    done = 0
    skipped: set[str] = set()
    progress(0, total)
    for repeat in range(repeats):
        first = repeat % len(loaders)
        for workload in workloads:
            for loader in (*loaders[first:], *loaders[:first]):
                if loader not in skipped:
                    task = BenchmarkTask(loader, workload, cores, WARM_UP, seconds)
                    result = measure_in_subprocess(task)
                    if result.problem:
                        skipped.add(loader)
                    yield LoaderMeasurement(loader, workload, repeat, result)
                done += 1
                progress(done, total)


def measure_in_subprocess(task: BenchmarkTask) -> TaskResult:
    """Measure one loader in a new interpreter; its worker processes end with it, within seconds."""
    command = [sys.executable, "-m", f"{__package__}.task", task.to_json()]
    # In a new session, so that Ctrl-C reaches this process only, which then kills the other.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=task.warm_up + task.seconds + TIMEOUT)
    except subprocess.TimeoutExpired:
        return TaskResult(problem=f"did not finish {TIMEOUT:.0f} seconds after the measured time")
    finally:
        process.kill()
        process.wait()
    if process.returncode != 0:
        last = (errors.strip().splitlines() or ["no message"])[-1]
        return TaskResult(problem=f"ended with code {process.returncode}: {last}")
    return TaskResult(**json.loads(output.strip().splitlines()[-1]))
