"""One piece of writing at a time, in the background."""

import threading
from collections.abc import Callable


class Writer:
    """Runs a job in a thread of its own while training goes on.

    finished, failed: jobs so far, the one at work left out. error: of the last one, where it failed.
    """

    def __init__(self) -> None:
        self.finished = 0
        self.failed = 0
        self.error: Exception | None = None
        self._thread: threading.Thread | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Begin; the job before is waited for. A job may fail."""
        self.wait()
        self.error = None
        # A process that ends does not wait for it: what is half written has no name yet.
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint writer", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception as error:  # whatever it was, the other ranks wait to hear of it
            self.error = error
            self.failed += 1
        else:
            self.finished += 1
