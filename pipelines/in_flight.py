"""A rank's file of the batches that its pipeline works on, and the search for what crashed it.

DALI decodes in the rank's own process, and a decoder that crashes ends the process before it can log
anything. The next start finds the file and decodes those samples alone, in a process of its own.
"""

import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from itertools import chain
from pathlib import Path

import torch

from pipelines.augment.params import TrainClipSpec, ViewSpec
from pipelines.autotune import LoaderOptions
from pipelines.dali.external_source import Source, TrainSource, ViewSource
from pipelines.dali.sample_reader import CrashedSamples, SampleReader, SampleRequest
from pipelines.dataset.concat import Dataset
from pipelines.dataset.probe import CRASHES, HANGS
from pipelines.decode_recovery import find_failure, upcoming_requests
from pipelines.sampling.sampler import TrainSampler, ViewSampler
from pipelines.worker_pool import IsolatedProcess

_BYTES = 256  # size of the file: it is overwritten in place
SUSPECTS = 8  # the last samples before a crash, any of which may have caused it
AGAIN = 3  # times that each of them is decoded alone
_MOST_AHEAD = 4096  # batches
_MOST = 2**31  # no count in the file is as large

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InFlight:
    """The content of the file."""

    batch: int
    """The next one that the loader returns, counted like `first` of a source."""
    ahead: int
    """How many may be in the pipeline."""
    samples: int
    """Clips of a micro-batch, or videos of a batch of views."""
    rank: int
    world_size: int

    def source(self, now: Source) -> Source | None:
        """The source of those batches; None where the sampler does not make such batches.

        now: the source of any rank, for the same data and sampler.
        """
        if isinstance(now, ViewSource):
            sampler = replace(now.sampler, batch=self.samples, world_size=self.world_size)
            return replace(now, sampler=sampler, rank=self.rank, first=self.batch)
        if now.sampler.global_batch % (self.samples * self.world_size) or self.samples % now.sampler.repeats:
            return None
        return replace(
            now, micro_batch=self.samples, rank=self.rank, world_size=self.world_size, first=self.batch
        )


class InFlightFile:
    """Written by one rank's loader, before each batch. A full disk costs the file, not the run."""

    def __init__(self, path: Path, source: Source, ahead: int) -> None:
        """ahead: how many batches may be in the pipeline at once."""
        self._path = path
        self._source = source
        self._ahead = ahead
        self._is_written = True
        self._file: int | None = None

    def write(self, batch: int) -> None:
        """Write which batch is next, counted from the source's first."""
        if not self._is_written:
            return
        source = self._source
        if isinstance(source, TrainSource):
            samples, world_size = source.micro_batch, source.world_size
        else:
            samples, world_size = source.samples, source.sampler.world_size
        now = InFlight(source.first + batch, self._ahead, samples, source.rank, world_size)
        try:
            self._overwrite(json.dumps(asdict(now)).encode().ljust(_BYTES))
        except OSError as error:
            self._is_written = False
            _log.warning(
                "%s cannot be written (%s): if DALI's decoder crashes, the next start cannot name the video",
                self._path,
                error.strerror or error,
            )

    def _overwrite(self, content: bytes) -> None:
        """Write in place, into a file that stays open: an open or a rename for each batch of each rank is
        slow on a cluster's file system. The content outlives the process, whatever ends it.
        """
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        os.pwrite(self._file, content, 0)

    def close(self) -> None:
        """Remove the file: no batch is in the pipeline."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._is_written:
            self._is_written = False
            self._path.unlink(missing_ok=True)


def read_in_flight(path: Path) -> InFlight | None:
    """The file of a process that did not close its loader; None where it is truncated or damaged."""
    try:
        values = json.loads(path.read_bytes()[:_BYTES])
        found = InFlight(**values)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    counts = astuple(found)
    if not all(type(count) is int and 0 <= count < _MOST for count in counts):
        return None
    is_usable = found.samples > 0 and found.rank < found.world_size and found.ahead <= _MOST_AHEAD
    return found if is_usable else None


def find_crashed(
    left: Iterable[Path],
    dataset: Dataset,
    sampler: TrainSampler | ViewSampler,
    clip: TrainClipSpec | ViewSpec,
    options: LoaderOptions,
) -> CrashedSamples:
    """The samples over which DALI's decoder crashes or hangs, and why.

    Decodes the samples in flight in a process of its own: some seconds for each file.

    Args:
        left: files of loaders that were not closed.
        sampler, clip, options: of the loaders of this start, which may have another number of ranks.
    """
    reader = SampleReader(
        dataset, options.decoding, storage=options.storage, max_short_side=clip.max_short_side
    )
    now: Source
    if isinstance(sampler, TrainSampler) and isinstance(clip, TrainClipSpec):
        now = TrainSource(reader, sampler, clip, sampler.repeats, rank=0, world_size=1, first=0)
    elif isinstance(sampler, ViewSampler) and isinstance(clip, ViewSpec):
        now = ViewSource(reader, sampler, clip, rank=0)
    else:
        raise TypeError("the sampler and the clip must both be of training, or both of evaluation")
    crashed: CrashedSamples = {}
    with IsolatedProcess() as process:
        for path in left:
            content = read_in_flight(path)
            source = None if content is None else content.source(now)
            if content is None or source is None:
                continue
            decoded: list[SampleRequest] = []
            for request in chain.from_iterable(upcoming_requests(source, content.ahead)):
                if request.row is None or not request.in_graph or request.sample in crashed:
                    continue
                decoded.append(request)
                reason = find_failure(process, reader, request, options.device)
                if reason in (CRASHES, HANGS):
                    culprit = _culprit(reader, decoded, options.device) if reason == CRASHES else request
                    crashed[culprit.sample] = reason
                    decoded.clear()
    return crashed


def _culprit(reader: SampleReader, decoded: Sequence[SampleRequest], device: torch.device) -> SampleRequest:
    """The sample that caused a crash, of those that the process decoded.

    A decoder that writes out of bounds may crash over a later sample. So the last ones are decoded again, the
    latest first, several times each, alone in a new process.
    """
    for request in reversed(decoded[-SUSPECTS:]):
        with IsolatedProcess() as process:
            for _ in range(AGAIN):
                if find_failure(process, reader, request, device) in (CRASHES, HANGS):
                    return request
    return decoded[-1]
