"""Which samples broke a pipeline: each is read and decoded again, alone, in a process of its own.

DALI reports that a batch failed, not which sample; and a decoder that crashes ends its process.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from typing import Any

import torch

from pipelines.dali.errors import DALI_ERRORS, format_dali_error
from pipelines.dali.external_source import Source
from pipelines.dali.pipeline import decode_only
from pipelines.dali.sample_layout import Arrays
from pipelines.dali.sample_reader import Decoding, RefusedRequests, SampleReader, SampleRequest
from pipelines.dataset.probe import CRASHES, HANGS
from pipelines.worker_pool import IsolatedProcess

SAMPLE_TIMEOUT = 180.0  # seconds for one sample, the start of its process included


def find_culprits(
    reader: SampleReader, batches: Iterable[Iterable[SampleRequest]], device: torch.device
) -> RefusedRequests:
    """The requests that cannot be read or decoded, with the reasons, of the first batch that has any.

    The next run of the pipeline shows what is bad in later batches. A sample that the reader itself finds bad
    does not count: it does not break a pipeline.
    """
    with IsolatedProcess() as process:
        for requests in batches:
            culprits: RefusedRequests = {}
            for request in requests:
                if request.row is None or request.key in culprits:
                    continue
                if reason := find_failure(process, reader, request, device):
                    culprits[request.key] = reason
            if culprits:
                return culprits
    return {}


def upcoming_requests(source: Source, batches: int) -> Iterator[list[SampleRequest]]:
    """What the next `batches` batches of a source ask for."""
    for batch in range(batches):
        yield [source.request(batch * source.samples + index) for index in range(source.samples)]


def find_failure(
    process: IsolatedProcess, reader: SampleReader, request: SampleRequest, device: torch.device
) -> str:
    """How a sample fails that is read and decoded in the process: `CRASHES`, `HANGS`, or with an error of
    DALI; empty where it does not.
    """
    try:
        if not request.in_graph:
            process.call(reader.load, request, seconds=SAMPLE_TIMEOUT)
            return ""
        error = process.call(_find_decode_error, reader, request, device, seconds=SAMPLE_TIMEOUT)
    except BrokenProcessPool:
        return CRASHES
    except TimeoutError:
        return HANGS
    return f"cannot be decoded: {error}" if error else ""


def _find_decode_error(reader: SampleReader, request: SampleRequest, device: torch.device) -> str:
    """The error of DALI for a sample that the graph decodes; empty if it decodes it."""
    loaded = reader.load(request)
    return "" if loaded.reason else _single_decoder(reader.decoding, device).find_error(loaded.arrays)


@lru_cache(maxsize=1)
def _single_decoder(decoding: Decoding, device: torch.device) -> "_SingleDecoder":
    return _SingleDecoder(decoding, device)


class _SingleDecoder:
    """The decoding part of a graph, for one sample at a time."""

    def __init__(self, decoding: Decoding, device: torch.device) -> None:
        self._decoding = decoding
        self._device = device
        self._arrays: Arrays = {}
        self._pipeline: Any = None

    def find_error(self, arrays: Arrays) -> str:
        """DALI's error over the sample; empty where it decodes it."""
        self._arrays = arrays
        if self._pipeline is None:
            self._pipeline = decode_only(
                lambda _: self._arrays, self._decoding, batch=1, threads=1, device=self._device
            )
        try:
            self._pipeline.run()
        except DALI_ERRORS as error:
            self._pipeline = None  # a pipeline that failed cannot run again
            return format_dali_error(str(error))
        return ""
