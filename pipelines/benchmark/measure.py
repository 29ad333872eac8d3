"""Every contender on every workload, round after round, each time in a fresh process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pipelines.benchmark.contender import Outcome, Task
from pipelines.benchmark.workload import Workload
from pipelines.errors import DataError

WARM_UP = 3.0  # seconds at least
START = 9.0  # seconds that a process takes until it is warm, besides: for the estimate
PATIENCE = 180.0  # seconds that a contender may take beyond what is measured


@dataclass(frozen=True)
class Measurement:
    """What one contender did in one round. repeat: counted from 0."""

    contender: str
    workload: Workload
    repeat: int
    outcome: Outcome


def choose_cores(count: int | None) -> tuple[int, ...]:
    """The numbers of the first `count` cores that this process may run on; all of them for None.

    Raises:
        DataError: there are not so many.
    """
    usable = sorted(os.sched_getaffinity(0))
    if count is not None and not 1 <= count <= len(usable):
        raise DataError(f"--cores {count}: this process may run on 1 to {len(usable)} cores")
    return tuple(usable[:count])


def estimate(measurements: int, seconds: float) -> float:
    """Seconds that so many measurements of `seconds` each take, about."""
    return measurements * (seconds + WARM_UP + START)


def measure_all(
    contenders: Sequence[str],
    workloads: Sequence[Workload],
    repeats: int,
    seconds: float,
    cores: tuple[int, ...],
    progress: Callable[[int, int], None],
) -> Iterator[Measurement]:
    """Measure all, `repeats` times; a contender that has a problem is reported once and left out afterwards.

    Contenders take turns on a workload, so that what else the machine does meets them alike, and begin with
    another one each round.

    Args:
        seconds: measured each time, after a warm-up.
        cores: numbers of the cores that a contender is bound to.
        progress: called after each measurement with the number done, and of all.
    """
    total = repeats * len(workloads) * len(contenders)
    done = 0
    left_out: set[str] = set()
    progress(0, total)
    for repeat in range(repeats):
        turn = repeat % len(contenders)
        for workload in workloads:
            for contender in (*contenders[turn:], *contenders[:turn]):
                if contender not in left_out:
                    task = Task(contender, workload, cores, WARM_UP, seconds)
                    outcome = in_fresh_process(task)
                    if outcome.problem:
                        left_out.add(contender)
                    yield Measurement(contender, workload, repeat, outcome)
                done += 1
                progress(done, total)


def in_fresh_process(task: Task) -> Outcome:
    """Measure one contender in a new interpreter; its processes end with it, at once or within seconds."""
    command = [sys.executable, "-m", f"{__package__}.contender", task.to_json()]
    # A session of its own: Ctrl-C reaches this process alone, which then ends the other.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=task.warm_up + task.seconds + PATIENCE)
    except subprocess.TimeoutExpired:
        return Outcome(problem=f"gave no clips for {PATIENCE:.0f} seconds")
    finally:
        process.kill()
        process.wait()
    if process.returncode != 0:
        last = (errors.strip().splitlines() or ["no message"])[-1]
        return Outcome(problem=f"ended with code {process.returncode}: {last}")
    return Outcome(**json.loads(output.strip().splitlines()[-1]))
