"""Chooses decoder, workers, threads and prefetched batches, from the measured cost of the first samples."""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from math import ceil

import torch

from pipelines.dali.encoded_input import GraphDecoder
from pipelines.dali.errors import DALI_ERRORS, format_dali_error
from pipelines.dali.external_source import Source
from pipelines.dali.pipeline import LoaderResources, decode_only
from pipelines.dali.sample_layout import Arrays
from pipelines.dali.sample_reader import Decoding
from pipelines.decode.dali_nodes import choose_decoder
from pipelines.decode.nvdec import LIBRARY, has_nvdec
from pipelines.errors import DataError
from pipelines.formatting import format_count
from pipelines.sample_timing import TIMING_SECONDS, SampleTiming, measure_samples
from pipelines.storage.remote_range import DIRECT, StorageOptions
from pipelines.worker_pool import IsolatedProcess, usable_cores

TIMING_ROUNDS = 3  # of the graph's decoder, or fewer where they take longer than TIMING_SECONDS
FASTEST = 500  # clips a second that one GPU trains on at most: ViT-B/16 of 8 frames is 0.9 TFLOP a clip
GPU_THREADS = 4  # DALI's CPU threads beside a GPU, which does the work: they launch and copy
NVDEC_THREADS = 8  # the same where the GPU decodes: each thread waits for one video; an H100 has 7 decoders
AHEAD = 2**31  # bytes that may be made ahead
MOST_AHEAD = 16  # batches
COPIED = 2**26  # bytes of the copy that is timed


@dataclass(frozen=True)
class LoaderOptions:
    """How batches are made, as asked for: `autotune` chooses what is None.

    They do not change the batches, except that decoders round colours differently.
    """

    device: torch.device
    """Of the batches."""
    decoder: str = "auto"
    """`auto`, `dali`, `pyav` or `hybrid`."""
    workers: int | None = None
    """Processes that read, and decode what the graph does not."""
    threads: int | None = None
    """DALI's CPU threads."""
    prefetch: int | None = None
    """Batches made ahead."""
    cores: int | None = None
    """That this rank may use; None is all of the machine."""
    graph_share: float | None = None
    """Of the samples, what the graph decodes where decoding is split."""
    storage: StorageOptions = DIRECT
    """How videos in an object store are read."""

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def decoding(self) -> Decoding:
        """Who decodes; where the share is not known, the graph gets all samples that it supports."""
        name = choose_decoder(self.decoder, gpu=self.gpu)
        share = 1.0 if self.graph_share is None else self.graph_share
        return Decoding(name, GraphDecoder.for_device(gpu=self.gpu), share)

    @property
    def decodes_in_graph(self) -> bool:
        """Whether DALI decodes any sample, in the rank's own process."""
        return self.decoding.name != "pyav"

    @property
    def splits(self) -> bool:
        """Whether the graph's decoder and PyAV share the samples, by their speed."""
        return self.decoding.name == "hybrid"

    @property
    def measures_share(self) -> bool:
        """Whether `autotune` measures the share, which runs the graph's decoder."""
        return self.splits and self.graph_share is None


def autotune(
    open_source: Callable[[Decoding], Source], options: LoaderOptions
) -> tuple[Decoding, LoaderResources]:
    """Choose what the options leave open: decoder, workers, threads, prefetched batches.

    open_source: returns the source of the samples to measure, with this decoding. Raises DataError if the GPU
    decodes and its library is missing: every video would count as bad.
    """
    cores = options.cores or usable_cores()
    decoding = options.decoding
    if options.gpu and options.decodes_in_graph and not has_nvdec():
        raise DataError(
            f"data.decoder {options.decoder} decodes on the GPU, and {LIBRARY} cannot be loaded here; in a "
            "container, set NVIDIA_DRIVER_CAPABILITIES=compute,utility,video; or set data.decoder to pyav"
        )
    source = open_source(decoding)
    timing = None
    if options.measures_share or options.workers is None or options.prefetch is None:
        timing = _measure(source, keep=options.measures_share)
    by_workers = timing
    if options.splits and (options.measures_share or options.workers is None):
        by_workers = _measure(open_source(Decoding("pyav")), keep=False)
    on_gpu = NVDEC_THREADS if options.decodes_in_graph else GPU_THREADS
    threads = options.threads or (min(on_gpu, cores) if options.gpu else cores)
    workers = options.workers or _workers(by_workers, source.clips_per_sample, cores, options)
    if options.measures_share:
        share = _graph_share(decoding, timing, by_workers, options.device, workers, threads)
        decoding = replace(decoding, graph_share=share)
    batch_bytes = source.samples * (timing.bytes if timing else 0.0) + source.output_bytes
    enough = ceil(2 * workers / source.samples) + 1  # then no worker waits for a batch to be complete
    prefetch = options.prefetch or max(1, min(enough, MOST_AHEAD, int(AHEAD / batch_bytes)))
    summary = (
        f"decoding by {_format_decoding(decoding, options)}: {timing.summary + '; ' if timing else ''}"
        f"{format_count(workers, 'worker')}, {format_count(threads, 'thread')}, "
        f"{prefetch} batches ahead on {cores} cores"
    )
    if timing and timing.advice:
        summary += f"; {timing.advice}"
    frames_bytes = batch_bytes - source.output_bytes
    if batch_bytes > AHEAD / 2 and frames_bytes > source.output_bytes and not source.clip.max_short_side:
        summary += (
            f"; a batch has {frames_bytes / 2**30:.1f} GiB of decoded frames, and their augmentation needs "
            "several times as much: augmentation.max_short_side scales them down while they are decoded"
        )
    return decoding, LoaderResources(options.device, workers, threads, prefetch, summary)


def _format_decoding(decoding: Decoding, options: LoaderOptions) -> str:
    if not options.splits:
        return decoding.name
    when = "" if options.measures_share else ", as measured when the run first started"
    return f"dali and pyav, {decoding.graph_share:.0%} by dali{when}"


def _workers(timing: SampleTiming | None, clips_per_sample: int, cores: int, options: LoaderOptions) -> int:
    """As many as make clips as fast as a GPU could train on them, and no more than there are cores."""
    most = max(1, cores - 1) if options.gpu else cores
    if timing is None:
        return most
    return min(most, max(1, ceil(FASTEST / clips_per_sample * (timing.read + timing.decode))))


def _measure(source: Source, *, keep: bool) -> SampleTiming | None:
    """What the first samples cost, measured in a process of its own, which a crash may end.

    keep: return their arrays. None where no sample can be read.
    """
    with IsolatedProcess() as process:
        try:
            return process.call(measure_samples, source, keep)
        except BrokenProcessPool:
            return None


def _graph_share(
    decoding: Decoding,
    in_graph: SampleTiming | None,
    by_workers: SampleTiming | None,
    device: torch.device,
    workers: int,
    threads: int,
) -> float:
    """The share of the samples with which the graph and the workers take equally long."""
    supported = [arrays for arrays in in_graph.samples if arrays["in_graph"]] if in_graph else []
    if not supported:
        return 0.0
    if by_workers is None:
        return 1.0
    graph_rate = _graph_rate(supported, decoding, device, threads)
    return graph_rate / (graph_rate + workers / max(1e-6, by_workers.decode))


def _graph_rate(samples: Sequence[Arrays], decoding: Decoding, device: torch.device, threads: int) -> float:
    """Samples a second that the graph decodes, measured on these; 0 where it fails over one of them."""
    pipeline = decode_only(
        lambda info: samples[info.idx_in_batch],
        decoding,
        batch=len(samples),
        threads=threads,
        device=device,
    )
    rounds, begun = 0, time.perf_counter()
    try:
        pipeline.run()
        begun = time.perf_counter()
        while rounds < TIMING_ROUNDS and (rounds == 0 or time.perf_counter() - begun < TIMING_SECONDS):
            pipeline.run()
            rounds += 1
    except DALI_ERRORS as error:
        logging.getLogger(__name__).warning(
            "dali fails over the first videos, so pyav decodes all: %s", format_dali_error(str(error))
        )
        return 0.0
    return rounds * len(samples) / (time.perf_counter() - begun)


def copy_seconds(device: torch.device) -> float:
    """Seconds to copy a byte from the host to the device; 0 on a CPU, where nothing is copied."""
    if device.type == "cpu":
        return 0.0
    host = torch.empty(COPIED, dtype=torch.uint8)
    host.to(device)
    torch.cuda.synchronize(device)
    begun = time.perf_counter()
    host.to(device)
    torch.cuda.synchronize(device)
    return (time.perf_counter() - begun) / COPIED
