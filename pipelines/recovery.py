"""After a pipeline broke: which of the samples it was at broke it.

DALI says that a batch failed, not which sample; and a decoder that crashes takes its whole process along. So
each sample is tried again by itself: read in a process of its own, then decoded by a graph of its own.
"""

import re
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from nvidia.dali import fn, pipeline_def

from .graph import Processes, decoded
from .parallel import STOP_SIGNALS, signals_blocked
from .source import Loaded, Reader, Request

CRASHES = "crashes the process that decodes it"
COMPLAINT = re.compile(r'Assert on "[^"]*" failed: (.+)')


def find_culprits(reader: Reader, requests: Iterable[Request], processes: Processes) -> dict[int, str]:
    """The samples among `requests` that cannot be read or decoded, and why, in words that follow the name.

    Samples that the reader itself finds bad are none: they do not break a pipeline.
    """
    culprits: dict[int, str] = {}
    wanted = {request.sample: request for request in requests if request.row is not None}
    with _Isolated(reader) as isolated:
        for sample, request in wanted.items():
            try:
                loaded = isolated.load(request)
            except BrokenProcessPool:
                culprits[sample] = CRASHES
                continue
            if request.in_graph and not loaded.reason:
                complaint = _complaint(reader, loaded, processes)
                if complaint is not None:
                    culprits[sample] = f"cannot be decoded: {complaint}"
    return culprits


class _Isolated:
    """A reader in a process of its own, which is replaced when it dies."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def __enter__(self) -> "_Isolated":
        self._open()
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(cancel_futures=True)

    def _open(self) -> None:
        self._executor = ProcessPoolExecutor(1, mp_context=get_context("spawn"))

    def load(self, request: Request) -> Loaded:
        """Raises BrokenProcessPool where that ends the process."""
        try:
            with signals_blocked(*STOP_SIGNALS):
                future = self._executor.submit(_load, self._reader, request)
            return future.result()
        except BrokenProcessPool:
            self._executor.shutdown()
            self._open()
            raise


def _load(reader: Reader, request: Request) -> Loaded:
    return reader.load(request)


def _complaint(reader: Reader, loaded: Loaded, processes: Processes) -> str | None:
    """What DALI says when it decodes this sample alone; None when it does."""

    @pipeline_def(
        batch_size=1,
        num_threads=1,
        device_id=(processes.device.index or 0) if processes.gpu else None,
        prefetch_queue_depth=1,
        enable_conditionals=True,
    )
    def alone() -> Any:
        payload = fn.external_source(
            source=lambda _: loaded.arrays,
            num_outputs=len(loaded.arrays),
            layout=reader.decoding.layouts,
            batch=False,
        )
        return decoded(payload, reader.decoding, gpu=processes.gpu)

    pipeline = alone()
    pipeline.build()
    try:
        pipeline.run()
    except RuntimeError as error:
        found = COMPLAINT.search(str(error))
        return found[1].strip() if found else str(error).strip().splitlines()[0]
    return None
