"""A process for work that may hang or crash, such as decoding an untrusted video."""

import multiprocessing
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from pipelines.worker_pool import STOP_SIGNALS, die_with_parent, signals_blocked
from trainer.errors import RunError, UserError
from trainer.system.process_exit import unusable_path

Work = Callable[[Any], Any]
"""Function from a request to a response; both are pickled between the two processes."""

_START_TIMEOUT = 300.0  # seconds for loading a model
_CLOSED = "this process was closed"


class TimedOutError(RunError):
    """The call took too long. The process was killed and restarted, unless it was still loading."""


class CrashedError(RunError):
    """The process died during the call and was restarted."""


class InferenceProcess:
    """A child process that prepares once and then serves one call after another.

    After a call that hangs or crashes, a new process is started and prepares again; the next call waits for
    it.

    prepare: returns a description and the work function; it and the main module must be importable.
    """

    def __init__(self, prepare: Callable[[], tuple[Any, Work]]) -> None:
        self._prepare = prepare
        self._lock = threading.Lock()
        self._closed = False
        self._spawn()

    def start(self) -> Any:
        """Wait until the process is ready; returns the description from `prepare`.

        Raises RunError with the reason if the preparation failed.
        """
        try:
            if not self._pipe.poll(_START_TIMEOUT):
                self._kill()
                raise RunError(f"the model was not loaded within {_START_TIMEOUT:.0f} s")
            is_ready, value = self._pipe.recv()
        except (EOFError, OSError):
            raise RunError("the process that loads the model died; it may be out of memory") from None
        if not is_ready:
            raise RunError(value)
        self._is_ready = True
        return value

    def call(self, request: Any, seconds: float) -> Any:
        """The response of the work function to a request.

        seconds: timeout, which includes loading the model again after a crash.

        Raises TimedOutError or CrashedError; RunError with the traceback if the work function raises.
        """
        end = time.monotonic() + seconds
        with self._lock:
            if not self._is_ready:
                self._wait_for_restart(seconds)
            try:
                self._pipe.send(request)
                if not self._pipe.poll(max(0.0, end - time.monotonic())):
                    raise TimedOutError(f"it took longer than {seconds:.0f} s")
                is_done, response = self._pipe.recv()
            except TimedOutError:
                self._restart()
                raise
            except (EOFError, OSError):
                self._restart()
                if self._closed:
                    raise RunError(_CLOSED) from None
                raise CrashedError("the decoder or the model crashed") from None
        if not is_done:
            raise RunError(response)
        return response

    def _wait_for_restart(self, seconds: float) -> None:
        """Wait for the new process to load; after a timeout it continues to load for the next call."""
        try:
            is_loaded = self._pipe.poll(seconds)
        except OSError:
            raise RunError(_CLOSED) from None
        if not is_loaded:
            if time.monotonic() - self._spawned > _START_TIMEOUT:
                self._restart()
            raise TimedOutError(f"the model was not loaded within {seconds:.0f} s")
        try:
            self.start()
        except RunError:
            self._restart()  # memory may have been short for a moment
            if self._closed:
                raise RunError(_CLOSED) from None
            raise

    def close(self) -> None:
        """Kill the process; a running call raises."""
        self._closed = True
        self._process.kill()  # a running call ends and releases the lock; only its holder closes the pipe
        with self._lock:
            self._kill()

    def _spawn(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._is_ready = False
        self._spawned = time.monotonic()
        process = context.Process(target=_work, args=(theirs, self._prepare), daemon=True)
        with signals_blocked(*STOP_SIGNALS):
            process.start()
        self._process = process  # once it runs: `close` may kill it from another thread
        theirs.close()

    def _restart(self) -> None:
        self._kill()
        if not self._closed:
            self._spawn()

    def _kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _work(pipe: Connection, prepare: Callable[[], tuple[Any, Work]]) -> None:
    die_with_parent()  # also if it hangs and the server is killed
    try:
        description, work = prepare()
    except (UserError, OSError) as error:
        message = str(error) if isinstance(error, UserError) else unusable_path(error)
        if message is None:
            raise
        pipe.send((False, message))
        return
    pipe.send((True, description))
    while True:
        with suppress(EOFError):
            request = pipe.recv()
            try:
                response = True, work(request)
            except Exception:
                response = False, traceback.format_exc()
            pipe.send(response)
            continue
        return  # the server has ended
