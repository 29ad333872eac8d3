"""How much shared memory a pipeline takes: what its workers hand over lies in /dev/shm.

DALI has `2 x prefetch` batches there (those made ahead, and as many that the pipeline may still read), each
in one chunk for each worker. A chunk takes the memory that was ever written to it: that of its largest part
of a batch.
"""

import time
from dataclasses import dataclass
from math import sqrt

import numpy as np

from pipelines.dali.external_source import Source, TrainSource
from pipelines.dali.pipeline import Graph, LoaderResources
from pipelines.dali.sample_reader import SampleRequest
from pipelines.dataset.manifest import ManifestRow

_SAMPLES = 256  # that are looked at
_SECONDS = 2.0  # that may take
_CHUNK = 16_384  # bytes of a chunk beside the samples: its own description, and pages that are begun


@dataclass(frozen=True)
class SharedMemoryNeed:
    """Bytes in /dev/shm. least: with samples of mean size. most: where each chunk once had an unusually large
    part of a batch.
    """

    least: int
    most: int


def shared_memory_need(graph: Graph, resources: LoaderResources) -> SharedMemoryNeed:
    """What a pipeline takes there, by the sizes of samples evenly over the dataset."""
    source = graph.source
    sizes = _sizes(source)
    whole, longer = divmod(source.samples, resources.workers)
    parts = [whole + (number < longer) for number in range(resources.workers)]  # samples of each worker
    batches = 2 * resources.prefetch
    fixed = batches * resources.workers * _CHUNK
    mean, deviation, largest = (float(figure(sizes)) for figure in (np.mean, np.std, np.max))
    least = batches * source.samples * mean
    most = batches * sum(
        min(
            count * largest,
            max(count * mean + 3 * deviation * sqrt(count), (count - 1) * mean + largest if count else 0.0),
        )
        for count in parts
    )
    return SharedMemoryNeed(int(least + fixed), int(most + fixed))


def _sizes(source: Source) -> list[int]:
    if isinstance(source, TrainSource):
        # A video comes again and again, each time cut otherwise.
        positions = max(_SAMPLES, len(source.reader.dataset) // source.world_size)
    else:
        positions = source.sampler.batches * source.sampler.batch
    step = max(1, positions // _SAMPLES)
    begun = time.monotonic()
    sizes = []
    for number in range(min(_SAMPLES, max(1, positions))):
        request = source.request(number * step)
        if request.row is not None:
            sizes.append(_bytes(source, request, request.row))
        if time.monotonic() - begun > _SECONDS:
            break
    return sizes or [0]


def _bytes(source: Source, request: SampleRequest, row: ManifestRow) -> int:
    """Of what a worker hands over for a request."""
    if request.in_graph:
        try:
            return row.length or source.reader.dataset.path(request.sample).stat().st_size
        except OSError:
            return 0  # a bad video, to be replaced by a small one
    top, left, bottom, right = request.window or (0, 0, row.height, row.width)
    return len(request.indices) * max(0, bottom - top) * max(0, right - left) * 3
