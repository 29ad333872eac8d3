"""After a pipeline broke: what it broke over.

DALI says that a batch failed, not which sample; and a decoder that crashes takes its whole process along. So
each sample is tried again by itself: read in a process of its own, then decoded by a graph of its own.
"""

import re
from collections.abc import Iterable
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from . import DataError
from .graph import Processes, decode_only
from .parallel import Isolation
from .probe import CRASHES
from .reader import Arrays, Decoding, Reader, Refused, Request
from .trial import load

BROKEN = (RuntimeError, ValueError, IndexError)
"""What DALI's own errors come as: they are C++'s, of these kinds."""

COMPLAINT = re.compile(r'Assert on "[^"]*" failed: (.+)')


def find_culprits(reader: Reader, batches: Iterable[Iterable[Request]], processes: Processes) -> Refused:
    """The requests that cannot be read or decoded, by their keys, and why, in words that follow the name.

    Looks at batch after batch and no further than the first that has any: the next run shows what else there
    is. Samples that the reader itself finds bad are none, they do not break a pipeline.
    """
    with Isolation() as isolation, _GraphAlone(reader.decoding, processes) as graph:
        for requests in batches:
            culprits: Refused = {}
            for request in requests:
                if request.row is None or request.key in culprits:
                    continue
                try:
                    loaded = isolation.call(load, reader, request)
                except BrokenProcessPool:
                    culprits[request.key] = CRASHES
                    continue
                complaint = "" if loaded.reason else graph.complaint(loaded.arrays)
                if complaint:
                    culprits[request.key] = f"cannot be decoded: {complaint}"
            if culprits:
                return culprits
    return {}


def in_words(error: str) -> str:
    """What a message of DALI's says, without where in its code and in ours."""
    found = COMPLAINT.search(error)
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    return found[1].strip() if found else lines[0] if lines else "no reason given"


def data_error(error: Exception) -> str | None:
    """The words of a DataError of a worker's, for which DALI raised `error`; None where it was another.

    DALI has the exception for a cause, in newer versions only its words, and the worker's traceback.
    """
    cause = error.__cause__
    name = f"{DataError.__module__}.{DataError.__qualname__}"
    if isinstance(cause, DataError) or str(error).rstrip().endswith(f"\n{name}: {cause}".rstrip()):
        return str(cause)
    return None


class _GraphAlone:
    """The decoding part of a graph, for one sample at a time."""

    def __init__(self, decoding: Decoding, processes: Processes) -> None:
        self._decoding = decoding
        self._processes = processes
        self._arrays: Arrays = ()
        self._pipeline: Any = None

    def __enter__(self) -> "_GraphAlone":
        return self

    def __exit__(self, *_: object) -> None:
        self._pipeline = None

    def complaint(self, arrays: Arrays) -> str:
        """What DALI says against the sample; nothing when it decodes it."""
        if self._decoding.name == "pyav":
            return ""
        self._arrays = arrays
        if self._pipeline is None:
            self._pipeline = decode_only(
                lambda _: self._arrays, self._decoding, batch=1, threads=1, device=self._processes.device
            )
        try:
            self._pipeline.run()
        except BROKEN as error:
            self._pipeline = None  # it is of no more use
            return in_words(str(error))
        return ""
