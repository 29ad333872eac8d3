"""A process for work that may hang or crash, as what is done to a stranger's video may."""

import multiprocessing
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from pipelines.dali.sample_reader import die_with_parent
from pipelines.worker_pool import STOP_SIGNALS, signals_blocked
from trainer.errors import RunError, UserError

Work = Callable[[Any], Any]
"""What is done with each thing that is asked; all of it is pickled, between these two processes alone."""

_START = 300.0  # seconds in which a model has to be loaded


class TimedOutError(RunError):
    """What was asked took longer than it may; the process was killed and another is started, but for one that
    was still loading.
    """


class CrashedError(RunError):
    """The process died over what it was asked; another is started."""


class InferenceProcess:
    """One process that prepares once, then does one thing after another.

    prepare: makes the work; importable by name, as the main module must be. After a call that hangs or
    crashes, a new process prepares anew, and the next call waits for it.
    """

    def __init__(self, prepare: Callable[[], tuple[Any, Work]]) -> None:
        self._prepare = prepare
        self._one_at_a_time = threading.Lock()
        self._closed = False
        self._spawn()

    def start(self) -> Any:
        """Wait until the process is ready; returns what `prepare` says of itself, first of the pair.

        Raises RunError with the reason where it cannot be prepared.
        """
        try:
            if not self._pipe.poll(_START):
                self._kill()
                raise RunError(f"the model was not loaded within {_START:.0f} s")
            is_ready, value = self._pipe.recv()
        except (EOFError, OSError):
            raise RunError("the process that loads the model died; out of memory, perhaps") from None
        if not is_ready:
            raise RunError(value)
        self._is_ready = True
        return value

    def call(self, what: Any, seconds: float) -> Any:
        """The work's answer, within so many seconds, loading anew after a crash among them.

        Raises TimedOutError or CrashedError; RunError with the traceback where the work raises.
        """
        end = time.monotonic() + seconds
        with self._one_at_a_time:
            if not self._is_ready:
                self._start_again(seconds)
            try:
                self._pipe.send(what)
                if not self._pipe.poll(max(0.0, end - time.monotonic())):
                    raise TimedOutError(f"it took longer than {seconds:.0f} s")
                went_well, answer = self._pipe.recv()
            except TimedOutError:
                self._renew()
                raise
            except (EOFError, OSError):
                self._renew()
                raise CrashedError("the decoder or the model crashed over it") from None
        if not went_well:
            raise RunError(answer)
        return answer

    def _start_again(self, seconds: float) -> None:
        """Wait for a process that loads anew; one that takes longer goes on, for the next one that asks."""
        try:
            is_there = self._pipe.poll(seconds)
        except OSError:
            raise RunError("this process was closed") from None
        if not is_there:
            if time.monotonic() - self._spawned > _START:
                self._renew()
            raise TimedOutError(f"the model was not loaded within {seconds:.0f} s")
        try:
            self.start()
        except RunError:
            self._renew()  # memory may have been short only now
            raise

    def close(self) -> None:
        """Kill the process, whatever it is at; what is asked meanwhile raises."""
        self._closed = True
        self._kill()

    def _spawn(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._is_ready = False
        self._spawned = time.monotonic()
        self._process = context.Process(target=_work, args=(theirs, self._prepare), daemon=True)
        with signals_blocked(*STOP_SIGNALS):
            self._process.start()
        theirs.close()

    def _renew(self) -> None:
        self._kill()
        if not self._closed:
            self._spawn()

    def _kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _work(pipe: Connection, prepare: Callable[[], tuple[Any, Work]]) -> None:
    die_with_parent()  # also where it hangs and the server is killed
    try:
        about, work = prepare()
    except UserError as error:
        pipe.send((False, str(error)))
        return
    pipe.send((True, about))
    while True:
        with suppress(EOFError):
            what = pipe.recv()
            try:
                answer = True, work(what)
            except Exception:
                answer = False, traceback.format_exc()
            pipe.send(answer)
            continue
        return  # the server is gone
