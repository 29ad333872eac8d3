"""Runs one measurement in a process of its own: `python -m trainer.benchmark.child FUNCTION ARGUMENTS`.

FUNCTION is `module:function` of this package, ARGUMENTS a JSON object. The result, a JSON object, is the last
line of stdout. A process of its own has its own peak memory, and leaves nothing to the next measurement.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from typing import IO, Any

from trainer.errors import UserError

TIMEOUT = 1800.0
"""Seconds after which a measurement is given up."""


class MeasurementError(UserError):
    """A measurement failed; the message ends with what its process printed last."""


def run_child(function: str, arguments: Mapping[str, Any], *, threads: int) -> dict[str, Any]:
    """The result of a function of this package, called in a new process with so many threads.

    Raises MeasurementError where it fails.
    """
    (result,) = run_children(function, [arguments], threads=threads)
    return result


def run_children(
    function: str,
    arguments: Sequence[Mapping[str, Any]],
    *,
    threads: int,
    variables: Sequence[Mapping[str, str]] = (),
) -> list[dict[str, Any]]:
    """The results of as many processes at the same time as there are `arguments`.

    variables: further environment variables of each. Raises MeasurementError where one fails; then, and after
    Ctrl-C, all are killed.
    """
    # Threads that wait asleep: spinning ones would count as CPU time of the model.
    common = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    processes: list[subprocess.Popen[str]] = []
    with ExitStack() as stack:
        errors = [stack.enter_context(_log_file()) for _ in arguments]
        for number, each in enumerate(arguments):
            command = [sys.executable, "-m", f"{__package__}.child", function, json.dumps(each)]
            own = {**common, **(variables[number] if variables else {})}
            # A session of its own: Ctrl-C reaches this process only, which then kills the others.
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=errors[number],
                text=True,
                env=own,
                start_new_session=True,
            )
            stack.callback(_end, process)
            processes.append(process)
        return [_result(process, log) for process, log in zip(processes, errors, strict=True)]


def _log_file() -> IO[str]:
    return tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")


def _result(process: subprocess.Popen[str], log: IO[str]) -> dict[str, Any]:
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise MeasurementError(f"a measurement did not end within {TIMEOUT:.0f} s") from None
    if process.returncode != 0:
        log.seek(0)
        last = (log.read().strip().splitlines() or ["no message"])[-1]
        raise MeasurementError(f"a measurement ended with code {process.returncode}: {last}")
    return json.loads(output.strip().splitlines()[-1])


def _end(process: subprocess.Popen[str]) -> None:
    """Kill a process and those that it started, its data workers."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        process.wait()


def main() -> None:
    function, arguments = sys.argv[1:]
    module, _, name = function.partition(":")
    result = getattr(import_module(f"{__package__}.{module}"), name)(**json.loads(arguments))
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
