"""What processes that a test starts run: apart, because they would import all that the test's file does."""

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
    """Dies over one video, as a decoder with a fault does."""

    def load(self, request: SampleRequest) -> LoadedSample:
        if request.sample == 2 and request.key not in self.refused:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().load(request)


@dataclass
class LockingReader(SampleReader):
    """Dies over one video the first time, holding the lock of the queue of results."""

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
    """Use that much CPU time, say how much it was, and do nothing until `spun` is closed."""
    while time.process_time() < seconds:
        pass
    spun.send(time.process_time())
    spun.poll(None)
