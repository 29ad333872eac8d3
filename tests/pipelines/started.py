"""Code for processes that tests start, apart from the imports of a test's file."""

import gc
import os
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from pipelines.dali.sample_reader import LoadedSample, SampleReader, SampleRequest


@dataclass
class CrashingReader(SampleReader):
    """Crashes over one video, as a faulty decoder does."""

    def load(self, request: SampleRequest) -> LoadedSample:
        if request.sample == 2 and request.key not in self.refused:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().load(request)


@dataclass
class LockingReader(SampleReader):
    """Is killed over one video the first time, while it holds the lock of the result queue."""

    late: int = -1
    once: Path = Path()

    def load(self, request: SampleRequest) -> LoadedSample:
        if request.sample == self.late and not self.once.exists():
            self.once.touch()
            queues = [one for one in gc.get_objects() if type(one).__name__ == "ShmQueue"]
            for queue in queues:
                if queue.MSG_CLASS.__name__ == "ShmMessageDesc":
                    queue.lock.acquire(timeout=5)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().load(request)


def spin(seconds: float, spun: Connection) -> None:
    """Use that much CPU time, send how much it was, and wait until `spun` is closed."""
    while time.process_time() < seconds:
        pass
    spun.send(time.process_time())
    spun.poll(None)
