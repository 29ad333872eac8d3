"""Which batches a rank's pipeline is at, in a file that outlives the process.

DALI decodes in the rank's own process, and a decoder that crashes ends it before a word can be said. The next
start finds the file, and tries by themselves the samples that the graph was decoding.
"""

import json
import logging
import os
from collections.abc import Iterable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, astuple, dataclass, replace
from itertools import chain
from pathlib import Path

from pipelines.augment.params import TrainClipSpec, ViewSpec
from pipelines.autotune import LoaderOptions
from pipelines.dali.encoded_input import GraphDecoder
from pipelines.dali.external_source import Source, TrainSource, ViewSource
from pipelines.dali.sample_reader import CrashedSamples, Decoding, SampleReader, SampleRequest
from pipelines.dataset.concat import Dataset
from pipelines.dataset.probe import CRASHES, HANGS
from pipelines.decode.dali_nodes import choose_decoder
from pipelines.decode_recovery import SAMPLE_TIMEOUT, find_decode_error, upcoming_requests
from pipelines.sampling.sampler import TrainSampler, ViewSampler
from pipelines.worker_pool import IsolatedProcess

_BYTES = 256  # of the file, whatever the numbers: it is written over in place
SUSPECTS = 8  # samples that may be to blame for a crash
AGAIN = 3  # times that each is decoded by itself
_MOST_AHEAD = 4096  # batches
_MOST = 2**31  # no count in the file is as large

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InFlight:
    """What the file says.

    batch: the next to be handed over, counted like `first` of a source. ahead: how many may be in the
    pipeline. samples: clips of a micro-batch, or videos of a batch of views. rank, world_size: the process's.
    """

    batch: int
    ahead: int
    samples: int
    rank: int
    world_size: int

    def source(self, now: Source) -> Source | None:
        """The source of those batches. now: any rank's, of the same data and plan. None where its plan is
        another.
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
    """Written by one rank's loader. A disk that has no room costs the file, not the run.

    ahead: how many batches may be in the pipeline at once.
    """

    def __init__(self, path: Path, source: Source, ahead: int) -> None:
        self.ahead = ahead
        self._path = path
        self._source = source
        self._is_written = True
        self._file: int | None = None

    def serve(self, batch: int) -> None:
        """Say which batch is next, counted from the source's first."""
        if not self._is_written:
            return
        source = self._source
        if isinstance(source, TrainSource):
            samples, world_size = source.micro_batch, source.world_size
        else:
            samples, world_size = source.samples, source.sampler.world_size
        now = InFlight(source.first + batch, self.ahead, samples, source.rank, world_size)
        try:
            self._write(json.dumps(asdict(now)).encode().ljust(_BYTES))
        except OSError as error:
            self._is_written = False
            _log.warning(
                "%s cannot be written (%s): should DALI's decoder crash, the video will not be named",
                self._path,
                error.strerror or error,
            )

    def _write(self, content: bytes) -> None:
        """In place, into a file that stays open: a file system of a cluster takes an open or a rename for
        each batch of each rank badly. What is written outlives the process, whatever ends it.
        """
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        os.pwrite(self._file, content, 0)

    def close(self) -> None:
        """No batch is in the pipeline any more."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._is_written:
            self._is_written = False
            self._path.unlink(missing_ok=True)


def read_in_flight(path: Path) -> InFlight | None:
    """What a process left that did not close its loader; None for a file that is cut off or damaged."""
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
    """The samples over which DALI's decoder ends its process, or does not come back, and why.

    They are looked for among those that loaders were at.

    left: files of loaders that were not closed. plan, clip, options: as the loaders of this start have them,
    which need not have as many ranks. Decodes in a process of its own: some seconds for each file.
    """
    decoding = Decoding(
        choose_decoder(options.decoder, gpu=options.gpu),
        GraphDecoder.for_device(gpu=options.gpu),
        1.0 if options.graph_share is None else options.graph_share,
    )
    reader = SampleReader(dataset, decoding)
    now: Source
    if isinstance(sampler, TrainSampler) and isinstance(clip, TrainClipSpec):
        now = TrainSource(reader, sampler, clip, sampler.repeats, rank=0, world_size=1, first=0)
    elif isinstance(sampler, ViewSampler) and isinstance(clip, ViewSpec):
        now = ViewSource(reader, sampler, clip, rank=0)
    else:
        raise TypeError("a plan and a clip of training, or both of evaluation")
    crashed: CrashedSamples = {}
    with IsolatedProcess() as isolation:
        for path in left:
            was = read_in_flight(path)
            then = None if was is None else was.source(now)
            if was is None or then is None:
                continue
            tried: list[SampleRequest] = []
            for request in chain.from_iterable(upcoming_requests(then, was.ahead)):
                if request.row is None or not request.in_graph or request.sample in crashed:
                    continue
                tried.append(request)
                reason = _ending(isolation, reader, request, options)
                if reason:
                    culprit = _culprit(reader, tried, options) if reason == CRASHES else request
                    crashed[culprit.sample] = reason
                    tried.clear()
    return crashed


def _ending(
    isolation: IsolatedProcess, reader: SampleReader, request: SampleRequest, options: LoaderOptions
) -> str:
    """How a sample ends the process that decodes it; empty where it does not."""
    try:
        isolation.call(find_decode_error, reader, request, options.device, seconds=SAMPLE_TIMEOUT)
    except BrokenProcessPool:
        return CRASHES
    except TimeoutError:
        return HANGS
    return ""


def _culprit(reader: SampleReader, tried: list[SampleRequest], options: LoaderOptions) -> SampleRequest:
    """Which of the samples that a process decoded until it crashed is to blame.

    A decoder that writes where it must not may end its process over a later sample. So the last ones are
    decoded again, the latest first, some times each and with no other before.
    """
    for request in reversed(tried[-SUSPECTS:]):
        with IsolatedProcess() as alone:
            if any(_ending(alone, reader, request, options) for _ in range(AGAIN)):
                return request
    return tried[-1]
