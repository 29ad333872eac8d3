"""After a pipeline broke: what it broke over.

DALI says that a batch failed, not which sample; and a decoder that crashes takes its whole process along. So
each sample is tried again by itself, read and decoded in a process of its own.
"""

import re
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from typing import Any

import torch

from pipelines.dali.external_source import Source
from pipelines.dali.pipeline import decode_only
from pipelines.dali.sample_reader import Arrays, Decoding, RefusedRequests, SampleReader, SampleRequest
from pipelines.dataset.probe import CRASHES, HANGS
from pipelines.errors import DataError
from pipelines.sample_timing import load
from pipelines.worker_pool import IsolatedProcess

BROKEN = (RuntimeError, ValueError, IndexError)
"""What DALI's own errors come as: they are C++'s, of these kinds."""

SAMPLE_TIMEOUT = 180.0  # seconds for one sample, the start of its process included

COMPLAINT = re.compile(r'Assert on "[^"]*" failed: (.+)')


def find_culprits(
    reader: SampleReader, batches: Iterable[Iterable[SampleRequest]], device: torch.device
) -> RefusedRequests:
    """The requests that cannot be read or decoded, by their keys, and why, in words that follow the name.

    Looks at batch after batch and no further than the first that has any: the next run shows what else there
    is. Samples that the reader itself finds bad are none, they do not break a pipeline.
    """
    with IsolatedProcess() as isolation:
        for upcoming_requests in batches:
            culprits: RefusedRequests = {}
            for request in upcoming_requests:
                if request.row is None or request.key in culprits:
                    continue
                try:
                    if request.in_graph:
                        complaint = isolation.call(
                            find_decode_error, reader, request, device, seconds=SAMPLE_TIMEOUT
                        )
                    else:
                        isolation.call(load, reader, request, seconds=SAMPLE_TIMEOUT)
                        complaint = ""
                except (BrokenProcessPool, TimeoutError) as error:
                    culprits[request.key] = HANGS if isinstance(error, TimeoutError) else CRASHES
                    continue
                if complaint:
                    culprits[request.key] = f"cannot be decoded: {complaint}"
            if culprits:
                return culprits
    return {}


def upcoming_requests(source: Source, batches: int) -> Iterator[list[SampleRequest]]:
    """What a source is asked for, batch after batch from its first on."""
    for batch in range(batches):
        yield [source.request(batch * source.samples + place) for place in range(source.samples)]


def find_decode_error(reader: SampleReader, request: SampleRequest, device: torch.device) -> str:
    """What DALI says against a sample that the graph decodes; nothing when it decodes it.

    For a process of its own, which a decoder may end.
    """
    loaded = reader.load(request)
    return "" if loaded.reason else _graph_alone(reader.decoding, device).complaint(loaded.arrays)


def format_dali_error(error: str) -> str:
    """What a message of DALI's says, without where in its code and in ours."""
    found = COMPLAINT.search(error)
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    return found[1].strip() if found else lines[0] if lines else "no reason given"


def find_data_error(error: Exception) -> str | None:
    """The words of a DataError of a worker's, for which DALI raised `error`; None where it was another.

    DALI has the exception for a cause, in newer versions only its words, and the worker's traceback.
    """
    cause = error.__cause__
    name = f"{DataError.__module__}.{DataError.__qualname__}"
    if isinstance(cause, DataError) or str(error).rstrip().endswith(f"\n{name}: {cause}".rstrip()):
        return str(cause)
    return None


@lru_cache(maxsize=1)
def _graph_alone(decoding: Decoding, device: torch.device) -> "_GraphAlone":
    return _GraphAlone(decoding, device)


class _GraphAlone:
    """The decoding part of a graph, for one sample at a time."""

    def __init__(self, decoding: Decoding, device: torch.device) -> None:
        self._decoding = decoding
        self._device = device
        self._arrays: Arrays = ()
        self._pipeline: Any = None

    def complaint(self, arrays: Arrays) -> str:
        """What DALI says against the sample; nothing when it decodes it."""
        self._arrays = arrays
        if self._pipeline is None:
            self._pipeline = decode_only(
                lambda _: self._arrays, self._decoding, batch=1, threads=1, device=self._device
            )
        try:
            self._pipeline.run()
        except BROKEN as error:
            self._pipeline = None  # it is of no more use
            return format_dali_error(str(error))
        return ""
