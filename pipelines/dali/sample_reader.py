"""Reading a sample: from disk to decoded frames, or to bytes that the graph decodes.

Runs in DALI's worker processes and never raises: an exception in a worker would end it for good and does not
say which file was bad. A bad file becomes a stand-in clip and a reason in words.
"""

import ctypes
import logging
import multiprocessing
import signal
import sys
import time
from dataclasses import dataclass, field, replace
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.dali.encoded_input import (
    PLACEHOLDER_SIZE,
    GraphDecoder,
    UnsupportedByGraph,
    check_encoded,
    placeholder_video,
)
from pipelines.dataset.concat import Samples
from pipelines.dataset.manifest import ManifestRow
from pipelines.decode.pyav import decode_frames
from pipelines.decode.video_file import VideoFile
from pipelines.errors import VideoError, format_unexpected

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
LONG_FILE = 64 * 2**20  # bytes

Arrays = tuple[NDArray[Any], ...]
Window = tuple[int, int, int, int]
RequestKey = tuple[int, bytes, bool]
RefusedRequests = dict[RequestKey, str]
CrashedSamples = dict[int, str]

# Bytes, indices, colour and orientation, as `check_encoded` gives them, of nothing.
NO_BYTES = (
    np.zeros(1, np.uint8),
    np.zeros(1, np.int32),
    np.eye(3, 4, dtype=np.float32),
    np.zeros(3, np.int32),
)


@dataclass(frozen=True)
class Decoding:
    """Who decodes.

    name: `pyav` (in the source), `dali` (in the graph) or `hybrid` (each sample where it fits). decoder: the
    graph's. graph_share: with `hybrid`, the share of the samples that the graph decodes, as far as it takes
    them.
    """

    name: str
    decoder: GraphDecoder = GraphDecoder.CPU
    graph_share: float = 1.0

    @property
    def layouts(self) -> list[str]:
        """Of what the graph gets: frames; bytes, indices, colour, orientation; or all of them, and which to
        use.
        """
        encoded = [""] * len(NO_BYTES)
        return {"pyav": ["FHWC"], "dali": encoded, "hybrid": [*encoded, "FHWC", ""]}[self.name]

    def in_graph(self, turn: int) -> bool:
        """Whether the graph is to decode the sample that is at this turn, counted over all ranks; what
        follows one another has its share of both.
        """
        if self.name != "hybrid":
            return self.name == "dali"
        return floor((turn + 1) * self.graph_share) > floor(turn * self.graph_share)


@dataclass(frozen=True)
class SampleRequest:
    """What is wanted of one sample.

    row: None at a place without a sample, or where the manifest's row is bad; reason: why it is.
    """

    sample: int
    row: ManifestRow | None
    indices: NDArray[np.int32]
    window: Window | None
    in_graph: bool
    reason: str = ""

    @property
    def key(self) -> RequestKey:
        """What decides whether it can be decoded: sample, frames and decoder, not when or on which rank."""
        return self.sample, self.indices.tobytes(), self.in_graph


@dataclass(frozen=True)
class LoadedSample:
    """A sample read from disk.

    arrays: for the graph. height, width: of its frames in pixels. origin: row and column of the frame at
    which the handed frames begin; they are all there are where the graph decodes. cost: what it took. reason:
    why it is bad, if it is.
    """

    arrays: Arrays
    height: int
    width: int
    origin: tuple[int, int] = (0, 0)
    cost: "SampleCost" = field(default_factory=lambda: SampleCost())
    reason: str = ""


@dataclass(frozen=True)
class SampleCost:
    """Of one sample, in the worker: seconds to read it, seconds of CPU time to decode it (or to look into
    what the graph decodes), and how often it was decoded (or handed to the graph for it).
    """

    read: float = 0.0
    decode: float = 0.0
    decodings: int = 0


NO_FRAMES = np.zeros((1, 1, 1, 3), np.uint8)


@dataclass
class SampleReader:
    """Reads samples of one dataset, as decoded frames or as bytes for the graph.

    dataset: travels to a worker; manifests as paths and fingerprints, to be mapped anew there. refused:
    requests that broke the graph or a worker before, by their keys, and why. Other frames of the same video
    are not refused: whether a clip is bad must not depend on what was tried before it, here or on another
    rank. crashed: samples over which the graph's decoder ended a process of this run, and why. It is given
    none of their frames at all later starts: another crash would cost the run one more start.
    """

    dataset: Samples
    decoding: Decoding
    refused: RefusedRequests = field(default_factory=dict)
    crashed: CrashedSamples = field(default_factory=dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What a worker process begins with."""
        die_with_parent()
        self.__dict__.update(state)

    def row(self, sample: int) -> tuple[ManifestRow | None, str]:
        """The sample's row in its manifest; where its values cannot be those of a video, none, and why."""
        try:
            return self.dataset.row(sample), ""
        except VideoError as defect:
            return None, str(defect)

    def load(self, request: SampleRequest) -> LoadedSample:
        """Read what is wanted; a place without a sample, and a bad video, give the stand-in."""
        if request.row is None:
            return self._stand_in(request, request.reason)
        row = request.row
        if (reason := self._refusal(request)) and request.in_graph and self.decoding.name == "hybrid":
            request = replace(request, in_graph=False)
            reason = self._refusal(request)
        if reason:
            return self._stand_in(request, reason)
        try:
            return self._read(request, row)
        except VideoError as defect:
            return self._stand_in(request, str(defect))
        except Exception as error:
            path = self.dataset.printable_path(request.sample)
            logging.getLogger(__name__).exception("unforeseen error while reading %s", path)
            return self._stand_in(request, format_unexpected(error))

    def _refusal(self, request: SampleRequest) -> str:
        """Why what is wanted is not tried; empty where it is."""
        if request.in_graph and request.sample in self.crashed:
            return self.crashed[request.sample]
        return self.refused.get(request.key, "")

    def _read(self, request: SampleRequest, row: ManifestRow) -> LoadedSample:
        path = self.dataset.path(request.sample)
        begun = time.perf_counter()
        source = read_content(path, row)
        read = time.perf_counter() - begun
        begun = time.thread_time()
        encoded = self._encoded(request, row, source) if request.in_graph else None
        if encoded is not None:
            cost = SampleCost(read, time.thread_time() - begun, decodings=1)
            return LoadedSample(self._arrays(encoded=encoded), row.height, row.width, cost=cost)
        frames = decode_frames(source, request.indices, request.window, size=(row.height, row.width))
        cost = SampleCost(read, time.thread_time() - begun, decodings=1)
        top, left = request.window[:2] if request.window else (0, 0)
        return LoadedSample(self._arrays(frames=frames), row.height, row.width, (top, left), cost)

    def _encoded(self, request: SampleRequest, row: ManifestRow, source: Path | bytes) -> Arrays | None:
        """What the graph needs to decode; None where PyAV has to.

        Raises VideoError for a bad video, and, where there is no PyAV, one that the graph does not take.
        """
        try:
            if isinstance(source, Path):
                raise UnsupportedByGraph(
                    f"is larger than {LONG_FILE >> 20} MiB; set data.decoder to pyav or hybrid"
                )
            encoded = check_encoded(source, row, request.indices, self.decoding.decoder)
        except UnsupportedByGraph:
            if self.decoding.name == "hybrid":
                return None
            raise
        return np.frombuffer(source, np.uint8), encoded.indices, encoded.color, encoded.orientation

    def _stand_in(self, request: SampleRequest, reason: str) -> LoadedSample:
        side, count = PLACEHOLDER_SIZE, len(request.indices)
        if self.decoding.name == "dali":
            data = np.frombuffer(placeholder_video(self.decoding.decoder), np.uint8)
            arrays = self._arrays(encoded=(data, np.zeros(count, np.int32), *NO_BYTES[2:]))
        else:
            arrays = self._arrays(frames=np.full((count, side, side, 3), 128, np.uint8))
        return LoadedSample(arrays, side, side, reason=reason)

    def _arrays(self, *, encoded: Arrays | None = None, frames: NDArray[np.uint8] | None = None) -> Arrays:
        """What the decoding's graph takes, from the one of the two that is given."""
        both = (*(encoded or NO_BYTES), NO_FRAMES if frames is None else frames)
        if self.decoding.name == "hybrid":
            return (*both, np.array(encoded is not None, np.int32))
        return both[-1:] if self.decoding.name == "pyav" else both[:-1]


def die_with_parent() -> None:
    """Have the kernel kill this worker when the process that started it dies, however it dies.

    Without, a run that is killed hard leaves its workers behind, waiting for ever.
    """
    if multiprocessing.parent_process() is not None and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def read_content(path: Path, row: ManifestRow) -> Path | bytes:
    """The sample's bytes: the whole file, or its piece of a shard. Of a long file, its path: a recording of
    hours does not belong into memory.
    """
    with VideoFile(path) as file:
        if row.length == 0 and file.size > LONG_FILE:
            return path
        return file.read_range(row.offset, row.length)
