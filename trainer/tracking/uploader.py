"""A background thread that uploads the outbox and retries after failures."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from trainer.tracking.outbox import Outbox
from trainer.tracking.upload_errors import UploadBlocked, first_line

GATHER = 1.0  # seconds between two uploads, so that each sends many records
FIRST_PAUSE = 1.0  # seconds after a failure, doubled after each further one
LONGEST_PAUSE = 60.0  # seconds
SILENT = 3.0  # seconds that `close` waits without a log line

_log = logging.getLogger(__name__)


@dataclass
class Uploader:
    """Uploads the outbox to MLflow from a daemon thread until closed. Errors are logged, never raised."""

    outbox: Outbox
    connect: Callable[[], Callable[[], None]]
    """Returns a function that uploads all complete lines of the outbox. Both may raise any exception;
    UploadBlocked if a retry is useless. It is called again after each failure."""

    def __post_init__(self) -> None:
        """Start the thread."""
        self._has_records = threading.Event()
        self._closing = threading.Event()
        self._abandoned = threading.Event()
        self._thread = threading.Thread(target=self._work, name="MLflow uploader", daemon=True)
        self._thread.start()

    def notify(self) -> None:
        """Wake the thread: the outbox has new records."""
        self._has_records.set()

    def close(self, timeout: float) -> int:
        """Wait up to `timeout` seconds for the thread. Returns the number of lines that are not uploaded."""
        self._closing.set()
        self._has_records.set()
        self._thread.join(min(SILENT, timeout))
        if self._thread.is_alive() and timeout > SILENT:
            _log.warning("waiting up to %.0f s for the upload to MLflow", timeout)
            self._thread.join(timeout - SILENT)
        self._abandoned.set()
        return self.outbox.count_undelivered()

    def _work(self) -> None:
        upload: Callable[[], None] | None = None
        pause = 0.0
        logged = ""
        while not self._abandoned.is_set():
            # Both before the upload: records that are appended during it need one more round.
            closing = self._closing.is_set()
            self._has_records.clear()
            try:
                upload = upload or self.connect()
                upload()
            except Exception as error:  # no error of an upload may stop the training
                upload = None
                logged = self._log_failure(error, logged)
                pause = min(max(FIRST_PAUSE, 2 * pause), LONGEST_PAUSE)
                if closing and isinstance(error, UploadBlocked):
                    return
                if closing:
                    self._abandoned.wait(FIRST_PAUSE)
                else:
                    self._closing.wait(pause)
                continue
            if pause:
                _log.warning("the upload to MLflow works again; all records are uploaded")
                pause, logged = 0.0, ""
            if closing:
                return
            self._closing.wait(GATHER)
            self._has_records.wait()

    def _log_failure(self, error: Exception, logged: str) -> str:
        """Log why nothing is uploaded, once per kind of failure; returns the kind.

        All outages are one kind: their texts differ from one attempt to the next.
        """
        if isinstance(error, UploadBlocked):
            kind = message = f"{error} Training continues, and the records stay in the outbox."
        else:
            kind = "outage"
            message = f"the upload to MLflow fails, training continues: {first_line(error)}"
        if kind != logged:
            _log.warning("%s", message)
        return kind
