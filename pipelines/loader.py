"""`ClipLoader`: iterate and get `ClipBatch`es on the device, from any step on."""

import gc
import logging
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.augment.mixing import MixedLabels, MixingSpec, mix_clips
from pipelines.augment.params import TrainClipSpec, ViewSpec
from pipelines.autotune import LoaderOptions, autotune, copy_seconds
from pipelines.bad_samples import BadSample, BadSamples
from pipelines.batch_hash import hash_clips
from pipelines.bottleneck import StageCosts, thread_seconds
from pipelines.dali.buffers import InUseBuffers
from pipelines.dali.errors import DALI_ERRORS, find_data_error, format_dali_error
from pipelines.dali.external_source import Source, TrainSource, ViewSource
from pipelines.dali.pipeline import (
    Graph,
    LoaderResources,
    assemble,
    starting_at,
)
from pipelines.dali.sample_reader import CrashedSamples, Decoding, RefusedRequests, SampleReader
from pipelines.dali.shared_memory import SharedMemoryNeed, shared_memory_need
from pipelines.dali.worker_lock import release_after_deaths
from pipelines.dataset.concat import Dataset, Samples
from pipelines.decode_recovery import find_culprits, upcoming_requests
from pipelines.errors import DataError
from pipelines.in_flight import InFlightFile
from pipelines.made_ahead import MadeAhead
from pipelines.sample_timing import TIMED_SAMPLES
from pipelines.sampling.sampler import TrainSampler, ViewSampler
from pipelines.worker_pool import STOP_SIGNALS, signals_blocked

WORKER_EXIT_TIMEOUT = 5.0  # seconds that a closing loader gives its workers to finish their video
IN_FLIGHT = 2  # times the prefetch: the source's queue and the pipeline's add up
ATTEMPTS = 3  # times that a pipeline may break over the same batch without a culprit


@dataclass(frozen=True)
class ClipBatch:
    """The input of one rank's forward pass."""

    clips: torch.Tensor
    """float32, (B, 3, T, H, W), or (B, V, 3, T, H, W) with V views in evaluation."""
    labels: torch.Tensor
    """int64, (B,)."""
    ids: torch.Tensor
    """int64, (B,): rows of the dataset, -1 for an empty slot."""
    valid: torch.Tensor
    """bool, (B,): False for placeholders, whose label must not count."""
    keys: torch.Tensor
    """int64, (B,): seeds of a training clip's dropout masks, the same wherever and whenever the clip is made
    (`TrainSampler.mask_key`); 0 in evaluation."""
    mixed: MixedLabels | None = None
    """The second labels, where clips are mixed."""
    known_hash: torch.Tensor | None = None
    """What `hash` returns, where the loader has computed it already."""

    def hash(self) -> torch.Tensor:
        """A hash of all clips: int64 scalar, see `hash_clips`."""
        if self.known_hash is not None:
            return self.known_hash
        return hash_clips(self.clips, self.labels, self.valid, self.keys)


@dataclass(frozen=True)
class _Made:
    """A batch, and what is counted when it is used."""

    batch: ClipBatch
    costs: StageCosts
    clips: int
    """Clips that are no empty slots."""
    bad: tuple[BadSample, ...]
    """Its samples that could not be read."""


class _PipelineBroken(Exception):
    """A pipeline that gives no more batches, and why."""


class ClipLoader:
    """Batches of one rank, made ahead in DALI's threads and worker processes.

    On a CPU, a thread fetches training batches from DALI and hashes them, one ahead of the training, which
    would otherwise wait for both. On a GPU the training launches its work ahead and waits for neither.

    `train_loader` and `view_loader` make one. `close()` ends the worker processes.

    The loader finds a video that breaks the pipeline, because DALI's decoder refuses it or a worker crashes
    over it, and treats it like any other bad sample; it builds the pipeline again, from the same batch on.
    """

    def __init__(
        self,
        graph: Graph,
        resources: LoaderResources,
        batches: int,
        in_flight: Path | None = None,
        mixing: MixingSpec | None = None,
        hashes: bool = False,
    ) -> None:
        """Start the worker processes.

        Args:
            batches: of one pass; 0 for an endless stream.
            in_flight: the `InFlightFile` to write while the graph decodes.
            mixing: of training clips.
            hashes: whether the thread that makes batches ahead hashes them.
        """
        self.batches = batches
        self.resources = resources
        self.bad_samples = BadSamples()
        self._graph = graph
        self._in_flight = None
        if in_flight is not None and graph.source.reader.decoding.name != "pyav":
            self._in_flight = InFlightFile(in_flight, graph.source, IN_FLIGHT * resources.prefetch)
        self._repeats = graph.source.clips_per_sample if isinstance(graph.source, TrainSource) else 1
        self._mixing = mixing
        self._copy_seconds = copy_seconds(resources.device)
        self._refused: RefusedRequests = {}
        self._served = 0
        self._made = 0  # batches, more than are served by what the thread has made ahead
        self._hashes = hashes
        self._costs = StageCosts()  # of the batches that are served, without augmentation
        self._augmented = 0.0  # seconds, by the threads of pipelines before this one
        self._ahead: MadeAhead[_Made] | None = None
        if batches == 0 and resources.device.type != "cuda":
            self._ahead = MadeAhead(self._make_ahead, "batches")
        self._buffers = InUseBuffers()
        self._closed = False
        self._start()

    def _start(self) -> None:
        """Start a pipeline at the next batch."""
        before, threads = set(multiprocessing.active_children()), set(thread_seconds())
        python_threads = set(threading.enumerate())
        self._pipeline = assemble(starting_at(self._graph, self._made, self._refused), self.resources)
        with signals_blocked(*STOP_SIGNALS):
            self._pipeline.build()
        self._workers = set(multiprocessing.active_children()) - before
        self._end_lock_watch = release_after_deaths(self._pipeline, self._workers)
        self._observers = set(threading.enumerate()) - python_threads  # DALI's, which watch the workers
        self._threads = set(thread_seconds()) - threads  # all but a few idle ones are DALI's

    def __iter__(self) -> Iterator[ClipBatch]:
        """Training: an endless stream that continues where the last iteration ended. Evaluation: one pass."""
        if self.batches == 0:
            while True:
                yield self._next()
        if self._served % self.batches:
            raise RuntimeError("the previous pass over this loader was not finished; make a new loader")
        for _ in range(self.batches):
            yield self._next()
        self._buffers.release_all()  # the next pass may be hours away

    @property
    def graph_share(self) -> float:
        """The share of the samples that the graph decodes if it supports them."""
        return self._graph.source.reader.decoding.graph_share

    def shared_memory(self) -> SharedMemoryNeed:
        """What its batches take in /dev/shm, estimated from some samples' rows and files."""
        return shared_memory_need(self._graph, self.resources)

    @property
    def costs(self) -> StageCosts:
        """What all batches so far have cost."""
        return self._costs + StageCosts(augment=self._augmented + self._augmenting())

    def _augmenting(self) -> float:
        """Seconds of the present pipeline's threads."""
        seconds = thread_seconds() if self._threads else {}
        return sum(seconds.get(each, 0.0) for each in self._threads)

    def _next(self) -> ClipBatch:
        if self._closed:
            raise RuntimeError("this loader is closed")
        self._buffers.release_finished()
        made = self._next_made()
        self._served += 1
        self._costs += made.costs
        self.bad_samples.seen += made.clips
        self.bad_samples.bad += len(made.bad) * self._repeats
        for bad in made.bad:
            self.bad_samples.add(bad)
        self._buffers.hold(made.batch.clips)
        return made.batch

    def _next_made(self) -> _Made:
        """The next batch; starts a new pipeline where one breaks.

        Pipelines are started here and not in the thread that makes batches ahead: Linux ends a worker with
        the thread that has started it.

        Raises DataError where a manifest is damaged, and where the pipeline breaks `ATTEMPTS` times over the
        same batch without a culprit.
        """
        broken = 0
        while True:
            try:
                return self._make() if self._ahead is None else self._ahead.next()
            except _PipelineBroken as error:
                reason = str(error)
            logging.getLogger(__name__).warning("the data pipeline broke and is built again: %s", reason)
            self._stop()
            culprits = self._find_culprits()
            broken = 0 if culprits else broken + 1
            if broken == ATTEMPTS:
                raise DataError(
                    f"the data pipeline broke {ATTEMPTS} times in a row over the same batch, and each of its "
                    "videos can be read and decoded alone; perhaps memory is short (lower data.workers, "
                    f"data.prefetch or evaluation.batch). The last error: {reason}"
                )
            self._refused = self._refused | culprits
            self._start()
            if self._ahead is not None:  # the error has ended its thread
                self._ahead = MadeAhead(self._make_ahead, "batches")

    def _make_ahead(self) -> _Made:
        made = self._make()
        if not self._hashes:
            return made
        batch = made.batch
        known_hash = hash_clips(batch.clips, batch.labels, batch.valid, batch.keys)
        return replace(made, batch=replace(batch, known_hash=known_hash))

    def _make(self) -> _Made:
        clips, *batches = self._run()
        self._made += 1
        source = self._graph.source
        arrays = dict(zip(source.layout.for_loader, batches, strict=True))
        records = np.array(arrays["record"].as_tensor()).view(source.record)[:, 0]
        costs = StageCosts(
            clips=len(records) * self._repeats,
            read=float(records["read"].sum()),
            decode=float(records["decode"].sum()),
            transfer=float(records["bytes"].sum()) * self._copy_seconds,
        )
        seen = int((records["sample"] >= 0).sum()) * self._repeats
        bad = tuple(self._bad_samples(records, arrays["reason"]))
        return _Made(self._batch(clips, records), costs, seen, bad)

    def _batch(self, clips: Any, records: np.ndarray) -> ClipBatch:
        """The batch on its device. records: of its samples.

        The clips are not copied: the tensor owns DALI's buffer, and returns it when the tensor is freed.
        """
        pixels = torch.from_dlpack(clips.as_tensor())
        by_clip = np.repeat(records, self._repeats)
        numbers = torch.from_numpy(
            np.stack([by_clip["label"], by_clip["sample"], by_clip["valid"], records["keys"].reshape(-1)])
        )
        pixels = pixels.flatten(0, 1) if self._repeats > 1 else pixels
        mixed = None
        if self._mixing is not None:
            valid_clips, clip_keys = numbers[2].tolist(), numbers[3].tolist()
            mixed = mix_clips(self._mixing, pixels, numbers[0], valid_clips, clip_keys, self._repeats)
        if mixed is not None:
            mixed = MixedLabels(self._to_device(mixed.labels), self._to_device(mixed.weights))
        labels, ids, valid, keys = self._to_device(numbers)
        return ClipBatch(pixels, labels, ids, valid.bool(), keys, mixed)

    def _to_device(self, numbers: torch.Tensor) -> torch.Tensor:
        if self.resources.device.type != "cuda":
            return numbers
        # A copy from memory that is not pinned would wait for all queued GPU work.
        return numbers.pin_memory().to(self.resources.device, non_blocking=True)

    def _run(self) -> Any:
        """The pipeline's next outputs. Raises _PipelineBroken, and DataError of a worker."""
        if self._in_flight is not None:
            self._in_flight.write(self._made)
        result = self._try_run()
        if isinstance(result, str):
            # Without the error itself, which would keep the broken pipeline and its memory alive.
            raise _PipelineBroken(result)
        return result

    def _try_run(self) -> Any:
        """The pipeline's next outputs, or as a string why it broke. Raises DataError of a worker."""
        # DALI detects a worker that dies while it reads a sample. It waits forever for one that dies idle.
        if not all(process.is_alive() for process in self._workers):
            return "a worker process has died"
        try:
            return self._pipeline.run()
        except Exception as error:
            data_error = find_data_error(error)
            if data_error is None and isinstance(error, DALI_ERRORS):
                return format_dali_error(str(error))
            if data_error is None:
                raise
        raise DataError(data_error)

    def _find_culprits(self) -> RefusedRequests:
        """What the pipeline broke over, among the batches in flight."""
        source = starting_at(self._graph, self._made, self._refused).source
        batches = upcoming_requests(source, IN_FLIGHT * self.resources.prefetch)
        return find_culprits(source.reader, batches, self.resources.device)

    def _bad_samples(self, records: np.ndarray, reasons: Any) -> Iterator[BadSample]:
        dataset = self._graph.source.reader.dataset
        for index in np.flatnonzero((records["sample"] >= 0) & (records["valid"] == 0)):
            sample = int(records["sample"][index])
            reason = bytes(np.array(reasons[int(index)])).decode()
            yield BadSample(sample, dataset.printable_path(sample), reason)

    def close(self) -> None:
        """End the worker processes; the loader gives no more batches."""
        self._closed = True
        if self._ahead is not None:
            self._ahead.stop(WORKER_EXIT_TIMEOUT, self._kill_workers)
        self._stop()
        if self._in_flight is not None:
            self._in_flight.close()

    def _stop(self) -> None:
        if not all(process.is_alive() for process in self._workers):
            # DALI ends the others, which block its signal. Closed before it notices, it would wait forever
            # for an answer of the dead one.
            self._kill_workers()
            for observer in self._observers:
                observer.join(WORKER_EXIT_TIMEOUT)
        # DALI asks the workers to exit and, after a second, terminates those in the middle of a video. They
        # block that signal as well, and DALI would wait forever.
        self._augmented, self._threads = self._augmented + self._augmenting(), set()
        deadline = threading.Timer(WORKER_EXIT_TIMEOUT, self._kill_workers)
        deadline.start()
        self._buffers.release_all()
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
    mixing: MixingSpec | None = None,
    hashes: bool = False,
) -> ClipLoader:
    """An endless loader of training micro-batches, the first of them of `first_step`.

    Args:
        crashed: samples that the graph does not decode, as `find_crashed` found them.
        in_flight: the file with which a later start finds them.
        mixing: mixup, CutMix and random erasing of the clips.
        hashes: whether each batch will be hashed, which the loader does ahead where it has a thread for it.

    Raises:
        DataError: the dataset is empty, or NVDEC is to decode and is missing.
        ValueError: a micro-batch would divide the repeats of a sample, or clips that are mixed.
    """
    if micro_batch % sampler.repeats:
        raise ValueError(f"a micro-batch of {micro_batch} divides the {sampler.repeats} repeats of a sample")
    if mixing is not None and mixing.mixes and micro_batch % (2 * sampler.repeats):
        raise ValueError(f"a micro-batch of {micro_batch} divides a pair of samples that are mixed")
    first = first_step * (sampler.global_batch // (micro_batch * world_size))

    def open_source(decoding: Decoding) -> TrainSource:
        reader = SampleReader(dataset, decoding, {}, crashed or {}, options.storage, clip.max_short_side)
        return TrainSource(reader, sampler, clip, micro_batch, rank, world_size, first)

    decoding, resources = _autotune(dataset, open_source, options, in_flight)
    return ClipLoader(Graph(open_source(decoding), mean, std), resources, 0, in_flight, mixing, hashes)


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

    Args:
        crashed, in_flight: as for `train_loader`.
        first: the batch to begin with, for a single pass.

    Raises:
        DataError: the dataset is empty, or NVDEC is to decode and is missing.
    """

    def open_source(decoding: Decoding) -> ViewSource:
        reader = SampleReader(dataset, decoding, {}, crashed or {}, options.storage, clip.max_short_side)
        return ViewSource(reader, sampler, clip, rank, first)

    decoding, resources = _autotune(dataset, open_source, options, in_flight)
    graph = Graph(open_source(decoding), mean, std)
    return ClipLoader(graph, resources, sampler.batches - first, in_flight)


def _autotune(
    dataset: Samples,
    open_source: Callable[[Decoding], Source],
    options: LoaderOptions,
    in_flight: Path | None,
) -> tuple[Decoding, LoaderResources]:
    if len(dataset) == 0:
        raise DataError(f"{dataset} lists no video")
    if in_flight is None or not options.measures_share:
        return autotune(open_source, options)
    # The graph decodes the first samples, and may crash over them.
    source = open_source(options.decoding)
    with closing(InFlightFile(in_flight, source, ceil(TIMED_SAMPLES / source.samples))) as file:
        file.write(0)
        return autotune(open_source, options)
