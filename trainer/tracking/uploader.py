"""A background thread that empties a spool, however often the other end fails."""

import logging
import threading
from collections.abc import Callable

from trainer.tracking.outbox import Outbox
from trainer.tracking.upload_errors import UploadBlocked, first_line

GATHER = 1.0  # seconds between two deliveries, so that records travel together
FIRST_PAUSE = 1.0  # seconds after a failed delivery, doubled after each further failure
LONGEST_PAUSE = 60.0  # seconds
SILENT = 3.0  # seconds that the end waits for the last delivery without a word

_log = logging.getLogger(__name__)


class Uploader:
    """Delivers a spool's lines from a daemon thread until it is closed. Nothing it does raises."""

    def __init__(self, outbox: Outbox, name: str, connect: Callable[[], Callable[[], None]]) -> None:
        """Start the thread.

        Args:
            spool: what to empty.
            name: who receives, for messages.
            connect: gives a function that delivers all complete lines of the spool; either may raise
                anything, Stopped where only a person can help. It is called anew after each failure.
        """
        self._outbox = outbox
        self._name = name
        self._connect = connect
        self._news = threading.Event()
        self._closing = threading.Event()
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"{name} uploader", daemon=True)
        self._thread.start()

    def notify(self) -> None:
        """Say that the spool has grown."""
        self._news.set()

    def close(self, timeout: float) -> int:
        """Let the thread finish; after `timeout` seconds it is left behind.

        Returns:
            Lines not delivered.
        """
        self._closing.set()
        self._news.set()
        self._thread.join(min(SILENT, timeout))
        if self._thread.is_alive() and timeout > SILENT:
            _log.warning("waiting up to %.0f s for %s to take the last records", timeout, self._name)
            self._thread.join(timeout - SILENT)
        self._given_up.set()
        return self._outbox.count_undelivered()

    def _work(self) -> None:
        deliver: Callable[[], None] | None = None
        pause = 0.0
        said = ""
        while not self._given_up.is_set():
            # Both before delivering: what is recorded meanwhile leads to one more round.
            closing = self._closing.is_set()
            self._news.clear()
            try:
                deliver = deliver or self._connect()
                deliver()
            except Exception as error:  # whatever goes wrong here, the run goes on
                deliver = None
                said = self._say(error, said)
                pause = min(max(FIRST_PAUSE, 2 * pause), LONGEST_PAUSE)
                if closing and isinstance(error, UploadBlocked):
                    return
                if closing:
                    self._given_up.wait(FIRST_PAUSE)
                else:
                    self._closing.wait(pause)
                continue
            if pause:
                _log.warning("%s is back and has all that was recorded meanwhile", self._name)
                pause, said = 0.0, ""
            if closing:
                return
            self._closing.wait(GATHER)
            self._news.wait()

    def _say(self, error: Exception, said: str) -> str:
        """Say why nothing is delivered, once as long as it is of the same kind; returns what was said last.

        Outages differ in words from one try to the next.
        """
        words = f"{self._name} takes nothing for now, the run goes on: {first_line(error)}"
        if isinstance(error, UploadBlocked):
            words = f"{error} The run goes on, and its records are kept."
        kind = words if isinstance(error, UploadBlocked) else "outage"
        if kind != said:
            _log.warning("%s", words)
        return kind
