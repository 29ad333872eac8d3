"""Shared memory that a pipeline needs: its workers write their samples to /dev/shm.

DALI keeps `2 x prefetch` batches there (those made ahead, and as many that the pipeline may still read), each
as one chunk per worker. A chunk takes as much memory as the largest part of a batch that was ever in it.
"""

import time
from dataclasses import dataclass
from math import sqrt

import numpy as np

from pipelines.dali.external_source import Source, TrainSource
from pipelines.dali.pipeline import Graph, LoaderResources
from pipelines.dali.sample_reader import SampleRequest
from pipelines.dataset.manifest import ManifestRow
from pipelines.dataset.source import open_source
from pipelines.errors import VideoError

_SAMPLES = 256  # whose sizes are estimated, at most
_SECONDS = 2.0  # spent on them, at most
_CHUNK = 16_384  # bytes of a chunk beside its samples: its metadata and partly used pages


@dataclass(frozen=True)
class SharedMemoryNeed:
    """Bytes in /dev/shm."""

    least: int
    """With samples of mean size."""
    most: int
    """Once each chunk has had an unusually large part of a batch."""


def shared_memory_need(graph: Graph, resources: LoaderResources) -> SharedMemoryNeed:
    """Bytes that a pipeline needs in /dev/shm, from the sizes of samples evenly spaced over the dataset."""
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
        # Every epoch crops a video differently.
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
    """Bytes of a sample's frames, or of its file where the graph decodes it."""
    if request.in_graph:
        try:
            encoded = open_source(source.reader.dataset.path(request.sample), row).encoded_bytes()
        except VideoError:
            return 0  # a bad sample, whose placeholder is small
        if encoded is not None:
            return encoded
    top, left, bottom, right = request.window or (0, 0, *source.reader.frame_size(row))
    return len(request.indices) * max(0, bottom - top) * max(0, right - left) * 3
