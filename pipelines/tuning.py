"""How a pipeline spreads itself over a machine where nobody says so: from its cores and what samples cost."""

import time
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def

from .decode import choose_decoder
from .graph import Graph, Processes, decoded, with_decoding
from .parallel import usable_cores
from .source import Arrays, Decoding

TRIAL = 1.0  # seconds that the first samples may be read for, to see what they cost
TRIAL_SAMPLES = 16
FASTEST = 500  # clips a second that one GPU trains on at most: ViT-B/16 of 8 frames is 0.9 TFLOP a clip
GPU_THREADS = 4  # DALI's CPU threads beside a GPU, which does the work: they launch and copy
AHEAD = 2**31  # bytes that may be made ahead
MOST_AHEAD = 16  # batches


@dataclass(frozen=True)
class LoaderOptions:
    """How batches are made; what is in them stays the same, pixels but for the decoders' rounding.

    device: where they end up. decoder: `auto`, `dali`, `pyav` or `hybrid`. workers: processes that read, and
    decode where the graph does not. threads: DALI's CPU threads. prefetch: batches made ahead. cores: those
    that this rank may use. None is decided here: all cores of the machine, and the rest from what samples
    cost.
    """

    device: torch.device
    decoder: str = "auto"
    workers: int | None = None
    threads: int | None = None
    prefetch: int | None = None
    cores: int | None = None

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"


@dataclass(frozen=True)
class Trial:
    """What the first samples cost each: seconds of reading, seconds of CPU time, bytes handed over."""

    samples: tuple[Arrays, ...]
    read: float
    decode: float
    bytes: float


def tune(graph: Graph, options: LoaderOptions) -> tuple[Graph, Processes, str]:
    """Decide what the options leave open: who decodes, how many processes and threads, how far ahead.

    Returns the graph with its decoding settled, the processes, and both in words.
    """
    cores = options.cores or usable_cores()
    name, codecs = choose_decoder(options.decoder, gpu=options.gpu)
    graph = with_decoding(graph, Decoding(name, codecs))
    trial = _try(graph)
    most = max(1, cores - 1) if options.gpu else cores
    workers = options.workers or min(most, max(1, ceil(FASTEST * (trial.read + trial.decode))))
    words = f"{name}, and pyav where that does not take a video" if name == "hybrid" else name
    if options.decoder == "hybrid":
        workers = options.workers or most
        share = _graph_share(graph, trial, options, workers)
        graph = with_decoding(graph, Decoding(name, codecs, share))
        words = f"hybrid, {share:.0%} in the graph"
    threads = options.threads or (min(GPU_THREADS, cores) if options.gpu else cores)
    batch_bytes = graph.source.samples * trial.bytes + graph.source.output_bytes
    enough = ceil(2 * workers / graph.source.samples) + 1  # no worker waits for the batch to be complete
    prefetch = options.prefetch or max(2, min(enough, MOST_AHEAD, int(AHEAD / batch_bytes)))
    words = (
        f"decoding by {words}: {1000 * trial.read:.1f} ms to read and {1000 * trial.decode:.1f} ms of CPU "
        f"time a video; {workers} workers, {threads} threads, {prefetch} batches ahead on {cores} cores"
    )
    return graph, Processes(options.device, workers, threads, prefetch), words


def _try(graph: Graph) -> Trial:
    """Read the first samples here, in turn, and see what they cost; bad ones are left out of it."""
    source = graph.source
    payload = len(source.reader.decoding.layouts)
    begun = time.perf_counter()
    samples, costs = [], []
    for position in range(TRIAL_SAMPLES):
        loaded = source.reader.load(source.request(position))
        if not loaded.reason:
            samples.append(loaded.arrays[:payload])
            costs.append((loaded.read, loaded.decode, sum(array.nbytes for array in loaded.arrays)))
        if time.perf_counter() - begun > TRIAL:
            break
    read, decode, size = np.mean(costs, axis=0) if costs else (0.0, 0.0, 0.0)
    return Trial(tuple(samples), float(read), float(decode), float(size))


def _graph_share(graph: Graph, in_graph: Trial, options: LoaderOptions, workers: int) -> float:
    """The share of the samples that the graph should decode so that it and the workers take equally long."""
    decoding = graph.source.reader.decoding
    fitting = [arrays for arrays in in_graph.samples if arrays[-1]]  # the flag says that the graph decodes it
    if not fitting:
        return 0.0
    by_workers = _try(with_decoding(graph, Decoding("pyav")))
    workers_rate = workers / max(1e-6, by_workers.decode)
    graph_rate = _graph_rate(fitting, decoding, options)
    return graph_rate / (graph_rate + workers_rate)


def _graph_rate(samples: list[Arrays], decoding: Decoding, options: LoaderOptions) -> float:
    """Samples a second that the graph decodes, measured on these."""

    @pipeline_def(
        batch_size=len(samples),
        num_threads=options.threads or options.cores or usable_cores(),
        device_id=(options.device.index or 0) if options.gpu else None,
        prefetch_queue_depth=1,
        enable_conditionals=True,
    )
    def alone() -> Any:
        payload = fn.external_source(
            source=lambda info: samples[info.idx_in_batch],
            num_outputs=len(decoding.layouts),
            layout=decoding.layouts,
            batch=False,
        )
        return decoded(payload, decoding, gpu=options.gpu)

    pipeline = alone()
    pipeline.build()
    pipeline.run()
    rounds = 3
    begun = time.perf_counter()
    for _ in range(rounds):
        pipeline.run()
    return rounds * len(samples) / (time.perf_counter() - begun)
