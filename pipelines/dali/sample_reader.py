"""Reading a sample: from disk to decoded frames, or to bytes that the graph decodes.

Runs in DALI's worker processes. `SampleReader.load` raises for no bad sample, which becomes a placeholder and
a reason: an exception would end the worker without naming the file. It raises DataError for what concerns all
samples.
"""

import logging
import time
from dataclasses import dataclass, field, replace
from math import floor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.dali.encoded_input import (
    PLACEHOLDER_SIZE,
    GraphDecodeInput,
    GraphDecoder,
    UnsupportedByGraph,
    check_encoded,
    placeholder_video,
)
from pipelines.dali.sample_layout import Arrays, decoding_layout
from pipelines.dataset.concat import Samples
from pipelines.dataset.manifest import ManifestRow
from pipelines.dataset.source import ReadFrames, open_source
from pipelines.decode.scaling import scaled_size
from pipelines.decode.video_file import LONG_FILE
from pipelines.errors import DataError, VideoError, format_unexpected
from pipelines.storage.remote_range import DIRECT, StorageOptions
from pipelines.worker_pool import die_with_parent

Window = tuple[int, int, int, int]
RequestKey = tuple[int, bytes, bool]
RefusedRequests = dict[RequestKey, str]
"""Requests that broke a pipeline, and why."""
CrashedSamples = dict[int, str]
"""Samples over which the graph's decoder ended its process, and why."""

NO_VIDEO = GraphDecodeInput(
    np.zeros(1, np.uint8), np.zeros(1, np.int32), np.eye(3, 4, dtype=np.float32), np.zeros(3, np.int32)
)
NO_FRAMES = np.zeros((1, 1, 1, 3), np.uint8)


@dataclass(frozen=True)
class Decoding:
    """Who decodes."""

    name: str
    """`pyav` (in the workers), `dali` (in the graph) or `hybrid` (split between both)."""
    decoder: GraphDecoder = GraphDecoder.CPU
    """The graph's decoder."""
    graph_share: float = 1.0
    """With `hybrid`, the share of the samples that the graph decodes if it supports them."""

    def in_graph(self, number: int) -> bool:
        """Whether the graph decodes sample `number` of the stream of all ranks.

        Any run of consecutive samples has its share of both decoders.
        """
        if self.name != "hybrid":
            return self.name == "dali"
        return floor((number + 1) * self.graph_share) > floor(number * self.graph_share)


@dataclass(frozen=True)
class SampleRequest:
    """Which frames of a sample to read."""

    sample: int
    """Row of the dataset; -1 for an empty slot."""
    row: ManifestRow | None
    """None for an empty slot, and where the manifest's row is bad."""
    indices: NDArray[np.int32]
    """Frame numbers in the row: those of a segment begin at 0."""
    window: Window | None
    """Top, left, bottom, right of the pixels that PyAV crops the frames to; None for whole frames."""
    in_graph: bool
    """Whether the graph decodes it."""
    reason: str = ""
    """Why the row is bad, if it is."""

    @property
    def key(self) -> RequestKey:
        """What decides whether it can be decoded: sample, frames and decoder, not step or rank."""
        return self.sample, self.indices.tobytes(), self.in_graph


@dataclass(frozen=True)
class SampleCost:
    """What one sample cost in the worker."""

    read: float = 0.0
    """Seconds to read it."""
    decode: float = 0.0
    """Seconds of CPU time to decode it, or to check it for the graph's decoder."""


@dataclass(frozen=True)
class LoadedSample:
    """A sample as read from disk, or a placeholder."""

    arrays: Arrays
    """By the names of `decoding_layout`."""
    height: int
    """Of the whole frames, in pixels, after scaling."""
    width: int
    origin: tuple[int, int] = (0, 0)
    """Row and column of the whole frame at which the frames in `arrays` begin."""
    cost: SampleCost = SampleCost()
    reason: str = ""
    """Why it is bad, if it is."""


@dataclass
class SampleReader:
    """Reads samples of one dataset, as decoded frames or as bytes for the graph."""

    dataset: Samples
    """Pickled to a worker as paths and fingerprints; the worker maps the manifests again."""
    decoding: Decoding
    refused: RefusedRequests = field(default_factory=dict)
    """Requests that broke the graph or a worker before. Other frames of the same video are read: whether a
    clip is bad must not depend on what was read before it, here or on another rank."""
    crashed: CrashedSamples = field(default_factory=dict)
    """Samples whose frames the graph never decodes again in this run: another crash would cost another
    start."""
    storage: StorageOptions = DIRECT
    """How videos in an object store are read."""
    max_short_side: int | None = None
    """To which frames with a longer short side are scaled down; None does not scale."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Runs first in a worker process."""
        die_with_parent()
        self.__dict__.update(state)

    def row(self, sample: int) -> tuple[ManifestRow | None, str]:
        """The sample's row in its manifest; None and a reason where its values cannot be those of a video."""
        try:
            return self.dataset.row(sample), ""
        except VideoError as error:
            return None, str(error)

    def frame_size(self, row: ManifestRow) -> tuple[int, int]:
        """(height, width) of the row's frames after scaling."""
        return scaled_size(row.height, row.width, self.max_short_side)

    def load(self, request: SampleRequest) -> LoadedSample:
        """Read a sample; an empty slot and a bad sample give the placeholder."""
        if request.row is None:
            return self._placeholder(request, request.reason)
        row = request.row
        if (reason := self._refusal(request)) and request.in_graph and self.decoding.name == "hybrid":
            request = replace(request, in_graph=False)
            reason = self._refusal(request)
        if reason:
            return self._placeholder(request, reason)
        try:
            return self._read(request, row)
        except VideoError as error:
            return self._placeholder(request, str(error))
        except DataError as error:
            # No property of this video: a store that is away, a damaged manifest. DALI may pass on the text
            # alone, in which `find_data_error` looks for this type and no subclass.
            raise DataError(str(error)) from error
        except Exception as error:
            path = self.dataset.printable_path(request.sample)
            logging.getLogger(__name__).exception("unexpected error while reading %s", path)
            return self._placeholder(request, format_unexpected(error))

    def _refusal(self, request: SampleRequest) -> str:
        """Why the request is refused; empty if it is not."""
        if request.in_graph and request.sample in self.crashed:
            return self.crashed[request.sample]
        return self.refused.get(request.key, "")

    def _read(self, request: SampleRequest, row: ManifestRow) -> LoadedSample:
        begun = time.perf_counter()
        sample = request.sample
        source = open_source(self.dataset.path(sample), row, self.dataset.packets(sample), self.storage)
        read_frames = source.read(request.indices, in_graph=request.in_graph)
        read = time.perf_counter() - begun
        begun = time.thread_time()
        encoded = self._encoded(read_frames, row) if request.in_graph else None
        if encoded is not None:
            cost = SampleCost(read, time.thread_time() - begun)
            return LoadedSample(self._arrays(encoded=encoded), row.height, row.width, cost=cost)
        frames = read_frames.decode(request.window, (row.height, row.width), self.max_short_side)
        cost = SampleCost(read, time.thread_time() - begun)
        top, left = request.window[:2] if request.window else (0, 0)
        return LoadedSample(self._arrays(frames=frames), *self.frame_size(row), (top, left), cost)

    def _encoded(self, read: ReadFrames, row: ManifestRow) -> GraphDecodeInput | None:
        """What the graph needs to decode it; None where the worker decodes it instead.

        Raises VideoError for a bad video, and with `dali` for one that the graph's decoder does not support.
        """
        try:
            if self.frame_size(row) != (row.height, row.width):
                raise UnsupportedByGraph(
                    "is scaled by augmentation.max_short_side; set data.decoder to pyav or hybrid"
                )
            if read.encoded is None:
                raise UnsupportedByGraph("is a folder of frames; set data.decoder to pyav or hybrid")
            if not isinstance(read.encoded, bytes):
                raise UnsupportedByGraph(
                    f"is larger than {LONG_FILE >> 20} MiB; set data.decoder to pyav or hybrid"
                )
            return check_encoded(read.encoded, row, read.indices, self.decoding.decoder)
        except UnsupportedByGraph:
            if self.decoding.name == "hybrid":
                return None
            raise

    def _placeholder(self, request: SampleRequest, reason: str) -> LoadedSample:
        side, count = PLACEHOLDER_SIZE, len(request.indices)
        if self.decoding.name == "dali":
            video = np.frombuffer(placeholder_video(self.decoding.decoder), np.uint8)
            arrays = self._arrays(encoded=replace(NO_VIDEO, video=video, indices=np.zeros(count, np.int32)))
        else:
            arrays = self._arrays(frames=np.full((count, side, side, 3), 128, np.uint8))
        return LoadedSample(arrays, side, side, reason=reason)

    def _arrays(
        self, *, encoded: GraphDecodeInput | None = None, frames: NDArray[np.uint8] | None = None
    ) -> Arrays:
        """The inputs of the graph, from the one of the two that is given; the other is empty."""
        arrays = {
            **vars(encoded or NO_VIDEO),
            "frames": NO_FRAMES if frames is None else frames,
            "in_graph": np.array(encoded is not None, np.int32),
        }
        return {array.name: arrays[array.name] for array in decoding_layout(self.decoding.name)}
