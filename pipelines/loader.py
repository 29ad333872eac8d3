"""`ClipLoader`: iterate and get `ClipBatch`es on the device, from any step on."""

import gc
import logging
import multiprocessing
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.augment.params import TrainClipSpec, ViewSpec
from pipelines.autotune import LoaderOptions, copy_seconds, tune
from pipelines.bad_samples import BadSample, BadSamples
from pipelines.bottleneck import StageCosts, cpu_seconds, own_threads
from pipelines.dali.buffers import InUseBuffers
from pipelines.dali.external_source import TrainSource, ViewSource
from pipelines.dali.pipeline import Graph, TrainGraph, ViewGraph, assemble, starting_at
from pipelines.dali.sample_reader import CrashedSamples, Decoding, RefusedRequests, SampleReader
from pipelines.dali.shared_memory import SharedMemoryNeed, shared_memory_need
from pipelines.dali.worker_lock import release_after_deaths
from pipelines.dataset.concat import Dataset, Samples
from pipelines.decode_recovery import (
    BROKEN,
    find_culprits,
    find_data_error,
    format_dali_error,
    upcoming_requests,
)
from pipelines.errors import DataError
from pipelines.in_flight import InFlightFile
from pipelines.sample_timing import TIMED_SAMPLES
from pipelines.sampling.sampler import TrainSampler, ViewSampler
from pipelines.worker_pool import STOP_SIGNALS, signals_blocked

WORKER_EXIT_TIMEOUT = 5.0  # seconds that a closing loader gives its workers to finish their video
IN_FLIGHT = 2  # times the prefetch: the source's queue and the pipeline's add up
ATTEMPTS = 3  # times that a pipeline may break over the same batch without anything to blame


@dataclass(frozen=True)
class ClipBatch:
    """What one rank's forward pass takes.

    clips: float32, (B, 3, T, H, W), or (B, V, 3, T, H, W) with V views in evaluation. labels, ids: int64,
    (B,); ids are rows of the dataset. valid: bool, (B,); False for stand-ins, whose label must not count.
    keys: int64, (B,); what a training clip's dropout masks are keyed with, the same wherever and whenever the
    clip is made (`TrainSampler.mask_key`); 0 in evaluation.
    """

    clips: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor
    valid: torch.Tensor
    keys: torch.Tensor


class ClipLoader:
    """Batches of one rank, made ahead in DALI's threads and worker processes.

    Make one with `train_loader` or `view_loader`. `batches`: of one pass, 0 for an endless stream. `tuning`:
    how it spread itself over the machine, in words. in_flight: where it keeps, while the graph decodes, which
    batches it is at (`InFlightFile`). `close()` ends the worker processes.

    A video that breaks the pipeline, because DALI's decoder refuses it or a worker crashes over it, is found
    and treated like any other bad one; the pipeline is built anew from the same batch on.
    """

    def __init__(
        self, graph: Graph, options: LoaderOptions, batches: int, in_flight: Path | None = None
    ) -> None:
        self.bad_samples = BadSamples()
        self.batches = batches
        self._in_flight = None
        if in_flight is not None and options.decodes_in_graph:
            self._in_flight = InFlightFile(
                in_flight, graph.source, ceil(TIMED_SAMPLES / graph.source.samples)
            )
            if options.splits and options.graph_share is None:
                self._in_flight.serve(0)  # the graph's speed is measured with the first samples
        self._graph, self.resources, self.tuning = tune(graph, options)
        if self._in_flight is not None:
            self._in_flight.ahead = IN_FLIGHT * self.resources.prefetch
        self._repeats = graph.source.clips_per_sample if isinstance(graph.source, TrainSource) else 1
        self._copy_seconds = copy_seconds(options.device)
        self._refused: RefusedRequests = {}
        self._served = 0
        self._costs = StageCosts()
        self._lent = InUseBuffers()
        self._closed = False
        self._open()

    def _open(self) -> None:
        """Start a pipeline at the next batch."""
        before, threads = set(multiprocessing.active_children()), own_threads()
        python_threads = set(threading.enumerate())
        self._pipeline = assemble(starting_at(self._graph, self._served, self._refused), self.resources)
        with signals_blocked(*STOP_SIGNALS):
            self._pipeline.build()
        self._workers = set(multiprocessing.active_children()) - before
        self._end_lock_watch = release_after_deaths(self._pipeline, self._workers)
        self._observers = set(threading.enumerate()) - python_threads  # DALI's, which watch the workers
        self._threads = own_threads() - threads  # all but a few idle ones are DALI's

    def __iter__(self) -> Iterator[ClipBatch]:
        """Training: an endless stream that goes on where the last iteration stopped. Evaluation: one pass."""
        if self.batches == 0:
            while True:
                yield self._next()
        if self._served % self.batches:
            raise RuntimeError("the previous pass over this loader was left in the middle; make a new loader")
        for _ in range(self.batches):
            yield self._next()
        self._lent.release()  # the next pass may be hours away

    @property
    def graph_share(self) -> float:
        """The share of the samples that the graph decodes, as far as it takes them."""
        return self._graph.source.reader.decoding.graph_share

    def shared_memory(self) -> SharedMemoryNeed:
        """What its batches take in /dev/shm. Looks at some samples."""
        return shared_memory_need(self._graph, self.resources)

    @property
    def costs(self) -> StageCosts:
        """What all batches so far have cost."""
        return self._costs + StageCosts(augment=cpu_seconds(self._threads))

    def _next(self) -> ClipBatch:
        self._lent.release_finished()
        clips, identity, reasons, costs = self._run()
        self._served += 1
        identity = np.array(identity.as_tensor())
        self._note(identity, reasons)
        read, decode, decodings, size = np.array(costs.as_tensor()).sum(axis=0)
        transfer = float(size) * self._copy_seconds
        made = len(identity) * self._repeats
        self._costs += StageCosts(made, int(decodings), float(read), float(decode), transfer=transfer)
        return self._handed_over(clips, self._by_clip(identity))

    def _by_clip(self, identity: np.ndarray) -> np.ndarray:
        """A row per sample with the key of each clip made of it → a row per clip with its own key, (B, 4)."""
        samples, keys = np.hsplit(identity, [3])
        return np.column_stack([np.repeat(samples, self._repeats, axis=0), keys.reshape(-1)])

    def _handed_over(self, clips: Any, identity: np.ndarray) -> ClipBatch:
        """The batch on its device. identity: (B, 4), sample, label, valid, key.

        Nothing is copied: DALI's buffer belongs to the tensor, and goes back to DALI when that is gone.
        """
        pixels = torch.from_dlpack(clips.as_tensor())
        self._lent.hold(pixels)
        numbers = torch.from_numpy(identity)
        if pixels.is_cuda:  # from memory that is not pinned, a copy waits for all that the GPU has to do
            numbers = numbers.pin_memory().to(pixels.device, non_blocking=True)
        ids, labels, valid, keys = numbers.unbind(dim=1)
        return ClipBatch(
            clips=pixels.flatten(0, 1) if self._repeats > 1 else pixels,
            labels=labels.contiguous(),
            ids=ids.contiguous(),
            valid=valid.bool(),
            keys=keys.contiguous(),
        )

    def _run(self) -> Any:
        """The pipeline's next outputs.

        Raises DataError where a manifest is damaged, and when the pipeline breaks again and again over the
        same batch, with nothing to blame.
        """
        if self._closed:
            raise RuntimeError("this loader is closed")
        broken = 0
        if self._in_flight is not None:
            self._in_flight.serve(self._served)
        while True:
            complaint = self._attempt()
            if isinstance(complaint, DataError):
                raise complaint
            if not isinstance(complaint, str):
                return complaint
            # Only words are kept of the error: it would hold the broken pipeline, and its memory, alive.
            logging.getLogger(__name__).warning("the data pipeline broke and is built anew: %s", complaint)
            self._shut()
            culprits = self._culprits()
            broken = 0 if culprits else broken + 1
            if broken == ATTEMPTS:
                raise DataError(
                    f"the data pipeline broke {ATTEMPTS} times in a row over the same batch, and each of its "
                    "videos can be read and decoded by itself; out of memory, perhaps (lower data.workers, "
                    f"data.prefetch or evaluation.batch). The last complaint: {complaint}"
                )
            self._refused = self._refused | culprits
            self._open()

    def _attempt(self) -> Any:
        """The pipeline's next outputs, or in words why it broke, or what a worker said against the data."""
        # DALI hears of a worker that dies at work. It would wait for ever for one that died idle.
        if not all(process.is_alive() for process in self._workers):
            return "a worker process has died"
        try:
            return self._pipeline.run()
        except Exception as error:
            words = find_data_error(error)
            if words is not None:
                return DataError(words)
            if isinstance(error, BROKEN):
                return format_dali_error(str(error))
            raise

    def _culprits(self) -> RefusedRequests:
        """What the pipeline broke over, in the batches that it was at."""
        source = starting_at(self._graph, self._served, self._refused).source
        batches = upcoming_requests(source, IN_FLIGHT * self.resources.prefetch)
        return find_culprits(source.reader, batches, self.resources.device)

    def _note(self, identity: np.ndarray, reasons: Any) -> None:
        self.bad_samples.seen += int((identity[:, 0] >= 0).sum()) * self._repeats
        dataset = self._graph.source.reader.dataset
        for place in np.flatnonzero((identity[:, 0] >= 0) & (identity[:, 2] == 0)):
            self.bad_samples.bad += self._repeats
            sample = int(identity[place, 0])
            reason = bytes(np.array(reasons[int(place)])).decode()
            self.bad_samples.add(BadSample(sample, dataset.printable_path(sample), reason))

    def close(self) -> None:
        """End the worker processes; the loader gives no more batches."""
        self._closed = True
        self._shut()
        if self._in_flight is not None:
            self._in_flight.close()

    def _shut(self) -> None:
        if not all(process.is_alive() for process in self._workers):
            # DALI ends the others, which do not hear its signal; asked to close before it has noticed, it
            # would wait for ever for the dead to answer.
            self._kill_workers()
            for observer in self._observers:
                observer.join(WORKER_EXIT_TIMEOUT)
        # DALI asks the workers to leave and, after a second, terminates those in the middle of a video. They
        # do not hear that signal either, and DALI would wait for ever.
        self._costs += StageCosts(augment=cpu_seconds(self._threads))
        self._threads = frozenset()
        deadline = threading.Timer(WORKER_EXIT_TIMEOUT, self._kill_workers)
        deadline.start()
        self._lent.release()
        self._pipeline = None
        gc.collect()
        deadline.cancel()
        self._end_lock_watch()

    def _kill_workers(self) -> None:
        for process in self._workers:
            process.kill()


def train_loader(
    dataset: Dataset,
    sampler: TrainSampler,
    clip: TrainClipSpec,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    micro_batch: int,
    rank: int,
    world_size: int,
    first_step: int,
    options: LoaderOptions,
    crashed: CrashedSamples | None = None,
    in_flight: Path | None = None,
) -> ClipLoader:
    """An endless loader of training micro-batches, the first of them belonging to `first_step`.

    crashed: samples that the graph's decoder is not given, as `find_crashed` found them at an earlier start.
    in_flight: the file with which it can find them at a later one.

    Raises DataError for an empty dataset; ValueError for a micro-batch that would part the repeats of a
    sample.
    """
    if micro_batch % sampler.repeats:
        raise ValueError(f"a micro-batch of {micro_batch} parts the {sampler.repeats} repeats of a sample")
    first = first_step * (sampler.global_batch // (micro_batch * world_size))
    source = TrainSource(_reader(dataset, crashed), sampler, clip, micro_batch, rank, world_size, first)
    return ClipLoader(TrainGraph(source, mean, std), options, 0, in_flight)


def view_loader(
    dataset: Samples,
    sampler: ViewSampler,
    clip: ViewSpec,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    rank: int,
    options: LoaderOptions,
    crashed: CrashedSamples | None = None,
    in_flight: Path | None = None,
    first: int = 0,
) -> ClipLoader:
    """A loader of all views of every video; each iteration over it is one pass, in the dataset's order.

    crashed, in_flight: as for `train_loader`. first: the batch to begin with, for a single pass that goes on.
    Raises DataError for an empty dataset.
    """
    source = ViewSource(_reader(dataset, crashed), sampler, clip, rank, first)
    return ClipLoader(ViewGraph(source, mean, std), options, sampler.batches - first, in_flight)


def _reader(dataset: Samples, crashed: CrashedSamples | None) -> SampleReader:
    """A reader for whom `tune` still has to choose the decoding."""
    if len(dataset) == 0:
        raise DataError(f"{dataset} lists no video")
    return SampleReader(dataset, Decoding("pyav"), crashed=crashed or {})
