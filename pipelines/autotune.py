"""How a pipeline spreads itself over a machine where nobody says so: from its cores and what samples cost."""

import logging
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from math import ceil

import torch

from pipelines.dali.encoded_input import GraphDecoder
from pipelines.dali.external_source import Source
from pipelines.dali.pipeline import Graph, LoaderResources, decode_only, with_decoding
from pipelines.dali.sample_reader import Arrays, Decoding
from pipelines.decode.dali_nodes import choose_decoder
from pipelines.decode.nvdec import LIBRARY, has_nvdec
from pipelines.decode_recovery import BROKEN, format_dali_error
from pipelines.errors import DataError
from pipelines.sample_timing import TIMING_SECONDS, SampleTiming, measure_samples
from pipelines.worker_pool import IsolatedProcess, usable_cores

TRIAL_ROUNDS = 3  # that the graph's decoder is timed for, or fewer where they take longer than TRIAL
FASTEST = 500  # clips a second that one GPU trains on at most: ViT-B/16 of 8 frames is 0.9 TFLOP a clip
GPU_THREADS = 4  # DALI's CPU threads beside a GPU, which does the work: they launch and copy
NVDEC_THREADS = 8  # where it decodes, too: each thread waits for one video, and an H100 has 7 decoders
AHEAD = 2**31  # bytes that may be made ahead
MOST_AHEAD = 16  # batches
COPIED = 2**26  # bytes copied to a device to see how long that takes


@dataclass(frozen=True)
class LoaderOptions:
    """How batches are made; what is in them stays the same, pixels but for the decoders' rounding.

    device: where they end up. decoder: `auto`, `dali`, `pyav` or `hybrid`. workers: processes that read, and
    decode where the graph does not. threads: DALI's CPU threads. prefetch: batches made ahead. cores: those
    that this rank may use. graph_share: of the samples, where the decoding is split. None is decided here:
    all cores of the machine, and the rest from what samples cost.
    """

    device: torch.device
    decoder: str = "auto"
    workers: int | None = None
    threads: int | None = None
    prefetch: int | None = None
    cores: int | None = None
    graph_share: float | None = None

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def decodes_in_graph(self) -> bool:
        """Whether DALI decodes any sample, in the rank's own process."""
        return choose_decoder(self.decoder, gpu=self.gpu) != "pyav"

    @property
    def splits(self) -> bool:
        """Whether the samples are split between the graph's decoder and PyAV, by how fast each of them is."""
        return choose_decoder(self.decoder, gpu=self.gpu) == "hybrid"


def tune(graph: Graph, options: LoaderOptions) -> tuple[Graph, LoaderResources, str]:
    """Decide what the options leave open: who decodes, how many processes and threads, how far ahead.

    Returns the graph with its decoding settled, the processes, and both in words. Raises DataError where the
    GPU is to decode and its library is not there: each video would be taken for a bad one.
    """
    cores = options.cores or usable_cores()
    name = choose_decoder(options.decoder, gpu=options.gpu)
    if options.gpu and name != "pyav" and not has_nvdec():
        raise DataError(
            f"data.decoder {options.decoder} decodes on the GPU, and {LIBRARY} cannot be loaded here; in a "
            "container, NVIDIA_DRIVER_CAPABILITIES=compute,utility,video; or set data.decoder to pyav"
        )
    decoding = Decoding(name, GraphDecoder.for_device(gpu=options.gpu))
    graph = with_decoding(graph, decoding)
    source = graph.source
    asks_share = options.splits and options.graph_share is None
    open_questions = asks_share or options.workers is None or options.prefetch is None
    trial = _try(source, keep=asks_share) if open_questions else None
    beside_gpu = GPU_THREADS if name == "pyav" else NVDEC_THREADS
    threads = options.threads or (min(beside_gpu, cores) if options.gpu else cores)
    by_workers = trial
    if options.splits and (asks_share or options.workers is None):
        by_workers = _try(with_decoding(graph, Decoding("pyav")).source, keep=False)
    workers = options.workers or _workers(by_workers, source.clips_per_sample, cores, options)
    if options.splits:
        share = options.graph_share
        if share is None:
            share = _graph_share(graph, trial, by_workers, options, workers, threads)
        graph = with_decoding(graph, replace(decoding, graph_share=share))
        kept = "" if asks_share else ", as measured when the run first started"
        name = f"dali and pyav, {share:.0%} by dali{kept}"
    batch_bytes = source.samples * (trial.bytes if trial else 0.0) + source.output_bytes
    enough = ceil(2 * workers / source.samples) + 1  # no worker waits for the batch to be complete
    prefetch = options.prefetch or max(2, min(enough, MOST_AHEAD, int(AHEAD / batch_bytes)))
    words = (
        f"decoding by {name}: {trial.words if trial else ''}{workers} worker{'s' * (workers > 1)}, "
        f"{threads} thread{'s' * (threads > 1)}, "
        f"{prefetch} batches ahead on {cores} cores{trial.advice if trial else ''}"
    )
    return graph, LoaderResources(options.device, workers, threads, prefetch), words


def _workers(trial: SampleTiming | None, clips_per_sample: int, cores: int, options: LoaderOptions) -> int:
    """As many as make clips as fast as anyone could train on them, and no more than there are cores."""
    most = max(1, cores - 1) if options.gpu else cores
    if trial is None:
        return most
    return min(most, max(1, ceil(FASTEST / clips_per_sample * (trial.read + trial.decode))))


def _try(source: Source, *, keep: bool) -> SampleTiming | None:
    """What the first samples cost, read in a process of its own: what crashes it must not end the run.

    keep: what the graph would get of them comes back, too. None where no sample could be read.
    """
    with IsolatedProcess() as isolation:
        try:
            return isolation.call(measure_samples, source, keep)
        except BrokenProcessPool:
            return None


def _graph_share(
    graph: Graph,
    in_graph: SampleTiming | None,
    by_workers: SampleTiming | None,
    options: LoaderOptions,
    workers: int,
    threads: int,
) -> float:
    """The share of the samples that the graph should decode so that it and the workers take equally long."""
    decoding = graph.source.reader.decoding
    # Their last array is the flag that the graph decodes them.
    fitting = [arrays for arrays in in_graph.samples if arrays[-1]] if in_graph else []
    if not fitting:
        return 0.0
    if by_workers is None:
        return 1.0
    graph_rate = _graph_rate(fitting, decoding, options.device, threads)
    return graph_rate / (graph_rate + workers / max(1e-6, by_workers.decode))


def _graph_rate(samples: list[Arrays], decoding: Decoding, device: torch.device, threads: int) -> float:
    """Samples a second that the graph decodes, measured on these; 0 where it refuses one of them."""

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
        while rounds < TRIAL_ROUNDS and (rounds == 0 or time.perf_counter() - begun < TIMING_SECONDS):
            pipeline.run()
            rounds += 1
    except BROKEN as error:
        logging.getLogger(__name__).warning(
            "dali fails over the first videos, so all are left to pyav: %s", format_dali_error(str(error))
        )
        return 0.0
    return rounds * len(samples) / (time.perf_counter() - begun)


def copy_seconds(device: torch.device) -> float:
    """Seconds that a byte takes from the host to the device; 0 on a CPU, where nothing is copied."""
    if device.type == "cpu":
        return 0.0
    host = torch.empty(COPIED, dtype=torch.uint8)
    host.to(device)
    torch.cuda.synchronize(device)
    begun = time.perf_counter()
    host.to(device)
    torch.cuda.synchronize(device)
    return (time.perf_counter() - begun) / COPIED
