"""Runs one measurement in a process of its own.

`python -m trainer.benchmark.child FUNCTION ARGUMENTS PARENT`: FUNCTION is `module:function` of this package,
ARGUMENTS a JSON object, PARENT the number of the process that waits for the result. The last line of stdout
is a JSON object: the result, or with exit code 78 the message for a user's mistake. A process of its own has
its own peak memory, and leaves nothing to the next measurement.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from typing import IO, Any

from models import ModelError
from pipelines.errors import DataError
from pipelines.worker_pool import die_with
from trainer.errors import RunError, UserError

TIMEOUT = 1800.0
"""Seconds after which a measurement is given up, if nothing else is said."""
_POLL = 0.05
"""Seconds between two looks at the processes."""
_MISTAKE = 78  # EX_CONFIG of <sysexits.h>; Python itself ends with 1 or 2
"""Exit code for an error that the user can repair."""


class MeasurementError(UserError):
    """A measurement failed; the message ends with what its process printed last."""


def run_child(
    function: str, arguments: Mapping[str, Any], *, threads: int, timeout: float = TIMEOUT
) -> dict[str, Any]:
    """The result of a function of this package, called in a new process with so many threads.

    Raises RunError for a mistake of the user, MeasurementError where it fails otherwise or takes longer than
    `timeout` seconds.
    """
    (result,) = run_children(function, [arguments], threads=threads, timeout=timeout)
    return result


def run_children(
    function: str,
    arguments: Sequence[Mapping[str, Any]],
    *,
    threads: int,
    variables: Sequence[Mapping[str, str]] = (),
    timeout: float = TIMEOUT,
) -> list[dict[str, Any]]:
    """The results of as many processes at the same time as there are `arguments`, their ranks.

    variables: further environment variables of each. Raises MeasurementError as soon as one fails, and after
    `timeout` seconds; then, and after Ctrl-C, all are killed. The kernel kills them when this process ends.
    """
    # Threads that wait asleep: spinning ones would count as CPU time of the model.
    common = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    processes: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        # Files, and not pipes: a process never waits for this one to read.
        outputs = [stack.enter_context(_text_file()) for _ in arguments]
        errors = [stack.enter_context(_text_file()) for _ in arguments]
        for number, each in enumerate(arguments):
            command = [sys.executable, "-m", f"{__package__}.child", function, json.dumps(each)]
            own = {**common, **(variables[number] if variables else {})}
            # A session of its own: Ctrl-C reaches this process only, which then kills the others.
            process = subprocess.Popen(
                [*command, str(os.getpid())],
                stdout=outputs[number],
                stderr=errors[number],
                env=own,
                start_new_session=True,
            )
            stack.callback(_end, process)
            processes.append(process)
        _wait(processes, outputs, errors, timeout)
        return [json.loads(_lines(output)[-1]) for output in outputs]


def _text_file() -> IO[str]:
    return tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")


def _wait(
    processes: Sequence[subprocess.Popen[bytes]],
    outputs: Sequence[IO[str]],
    errors: Sequence[IO[str]],
    timeout: float,
) -> None:
    """Return when all have ended well. Raises RunError for a user's mistake, else MeasurementError."""
    deadline = time.monotonic() + timeout
    while True:
        codes = [process.poll() for process in processes]
        mistakes = [
            json.loads(_lines(outputs[rank])[-1])["error"]
            for rank, code in enumerate(codes)
            if code == _MISTAKE
        ]
        if mistakes:  # the same for all ranks
            raise RunError(mistakes[0])
        failures = []
        for rank, code in enumerate(codes):
            if code:
                name = "a measurement" if len(codes) == 1 else f"rank {rank} of {len(codes)}"
                last = (_lines(errors[rank]) or ["no message"])[-1]
                how = f"ended with code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
                failures.append(f"{name} {how}: {last}")
        if failures:
            raise MeasurementError("; ".join(failures))
        if None not in codes:
            return
        if time.monotonic() > deadline:
            waiting = ", ".join(str(rank) for rank, code in enumerate(codes) if code is None)
            name = "a measurement" if len(codes) == 1 else f"ranks {waiting} of {len(codes)}"
            raise MeasurementError(
                f"{name} did not end within {timeout:g} s; measure less in one process, or allow more with "
                "--timeout SECONDS"
            )
        time.sleep(_POLL)


def _lines(file: IO[str]) -> list[str]:
    file.seek(0)
    return file.read().strip().splitlines()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and those that it started, its data workers."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        process.wait()


def main() -> None:
    function, arguments, parent = sys.argv[1:]
    die_with(int(parent))
    module, _, name = function.partition(":")
    try:
        result = getattr(import_module(f"{__package__}.{module}"), name)(**json.loads(arguments))
    except (UserError, DataError, ModelError) as error:
        print(json.dumps({"error": str(error)}), flush=True)
        os._exit(_MISTAKE)  # Python's shutdown would wait for other ranks
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
