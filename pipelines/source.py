"""The DALI external sources: they read and decode a sample and hand it over with its numbers from the plan.

They run in DALI's worker processes, are stateless (the sample follows from the position alone) and never
raise: an exception in a worker would end it for good and does not say which file was bad. A bad file becomes
a stand-in clip with `valid` 0 and a reason in words.

What is handed over, in this order: what the decoding asks for (`Decoding.layouts`), who the sample is, why it
is bad, what it cost, and the numbers of the graph. Importing this module must stay cheap: every worker does
it.
"""

import ctypes
import logging
import multiprocessing
import signal
import sys
import time
from dataclasses import astuple, dataclass, field, replace
from math import floor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from . import VideoDefect
from .dataset import Dataset
from .draw import ClipDraw, TrainClip, ViewClip, draw_clip
from .encoded import STAND_IN_SIZE, NotForGraph, check_encoded, stand_in
from .frames import view_indices
from .manifest import Row
from .plan import TrainPlan, ViewPlan
from .pyav_decode import decode_frames

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
FLOAT = 4  # bytes
LONG_FILE = 64 * 2**20  # bytes

Arrays = tuple[NDArray[Any], ...]
Window = tuple[int, int, int, int]
RequestKey = tuple[int, bytes, bool]
Refused = dict[RequestKey, str]


class SampleInfo(Protocol):
    """What DALI tells a source about the sample it wants."""

    idx_in_epoch: int


@dataclass(frozen=True)
class Decoding:
    """Who decodes.

    name: `pyav` (in the source), `dali` (in the graph) or `hybrid` (each sample where it fits). codecs: what
    the graph's decoder takes. graph_share: with `hybrid`, the share of the samples that the graph decodes, as
    far as it takes them.
    """

    name: str
    codecs: frozenset[str] = frozenset()
    graph_share: float = 1.0

    @property
    def layouts(self) -> list[str]:
        """Of what the graph gets: frames; bytes, indices, colour; or all of them, and which to use."""
        return {"pyav": ["FHWC"], "dali": ["", "", ""], "hybrid": ["", "", "", "FHWC", ""]}[self.name]

    def in_graph(self, turn: int) -> bool:
        """Whether the graph is to decode the sample that is at this turn, counted over all ranks; what
        follows one another has its share of both.
        """
        if self.name != "hybrid":
            return self.name == "dali"
        return floor((turn + 1) * self.graph_share) > floor(turn * self.graph_share)


@dataclass(frozen=True)
class Request:
    """What is wanted of one sample. row: None at a place without a sample."""

    sample: int
    row: Row | None
    indices: NDArray[np.int32]
    window: Window | None
    in_graph: bool

    @property
    def key(self) -> RequestKey:
        """What decides whether it can be decoded: sample, frames and decoder, not when or on which rank."""
        return self.sample, self.indices.tobytes(), self.in_graph


@dataclass(frozen=True)
class Loaded:
    """A sample read from disk.

    arrays: for the graph. height, width: of its frames in pixels. origin: row and column of the frame at
    which the handed frames begin; they are all there are where the graph decodes. cost: what it took. reason:
    why it is bad, if it is.
    """

    arrays: Arrays
    height: int
    width: int
    origin: tuple[int, int] = (0, 0)
    cost: "Cost" = field(default_factory=lambda: Cost())
    reason: str = ""


@dataclass(frozen=True)
class Cost:
    """Of one sample, in the worker: seconds to read it, seconds of CPU time to decode it (or to look into
    what the graph decodes), and how often it was decoded (or handed to the graph for it).
    """

    read: float = 0.0
    decode: float = 0.0
    decodings: int = 0


NO_BYTES = (np.zeros(1, np.uint8), np.zeros(1, np.int32), np.eye(3, 4, dtype=np.float32))
NO_FRAMES = np.zeros((1, 1, 1, 3), np.uint8)


@dataclass
class Reader:
    """Reads samples of one dataset, as decoded frames or as bytes for the graph.

    dataset: travels to a worker as paths and fingerprints, and is mapped anew there. refused: requests that
    broke the graph or a worker before, by their keys, and why. Other frames of the same video are not
    refused: whether a clip is bad must not depend on what was tried before it, here or on another rank.
    """

    dataset: Dataset
    decoding: Decoding
    refused: Refused = field(default_factory=dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What a worker process begins with."""
        _die_with_parent()
        self.__dict__.update(state)

    def load(self, request: Request) -> Loaded:
        """Read what is wanted; a place without a sample, and a bad video, give the stand-in."""
        if request.row is None:
            return self._stand_in(request, "")
        if request.key in self.refused and request.in_graph and self.decoding.name == "hybrid":
            request = replace(request, in_graph=False)
        if request.key in self.refused:
            return self._stand_in(request, self.refused[request.key])
        try:
            return self._read(request)
        except VideoDefect as defect:
            return self._stand_in(request, str(defect))
        except Exception as error:
            path = self.dataset.path(request.sample)
            logging.getLogger(__name__).exception("unforeseen error while reading %s", path)
            return self._stand_in(request, f"{type(error).__name__}: {error}")

    def _read(self, request: Request) -> Loaded:
        row, path = self.dataset.row(request.sample), self.dataset.path(request.sample)
        source: Path | bytes = path
        begun = time.perf_counter()
        if not _is_long(path, row):
            source = _read_bytes(path, row)
        read = time.perf_counter() - begun
        begun = time.thread_time()
        encoded = self._encoded(request, row, source) if request.in_graph else None
        if encoded is not None:
            cost = Cost(read, time.thread_time() - begun, decodings=1)
            return Loaded(self._arrays(encoded=encoded), row.height, row.width, cost=cost)
        frames = decode_frames(source, request.indices, request.window, size=(row.height, row.width))
        cost = Cost(read, time.thread_time() - begun, decodings=1)
        top, left = request.window[:2] if request.window else (0, 0)
        return Loaded(self._arrays(frames=frames), row.height, row.width, (top, left), cost)

    def _encoded(self, request: Request, row: Row, source: Path | bytes) -> Arrays | None:
        """What the graph needs to decode; None where PyAV has to.

        Raises VideoDefect for a bad video, and, where there is no PyAV, one that the graph does not take.
        """
        try:
            if isinstance(source, Path):
                raise NotForGraph(f"is larger than {LONG_FILE >> 20} MiB; set data.decoder to pyav or hybrid")
            encoded = check_encoded(source, row, request.indices, self.decoding.codecs)
        except NotForGraph:
            if self.decoding.name == "hybrid":
                return None
            raise
        return np.frombuffer(source, np.uint8), encoded.indices, encoded.color

    def _stand_in(self, request: Request, reason: str) -> Loaded:
        side, count = STAND_IN_SIZE, len(request.indices)
        if self.decoding.name == "dali":
            data = np.frombuffer(stand_in(self.decoding.codecs), np.uint8)
            arrays = self._arrays(encoded=(data, np.zeros(count, np.int32), NO_BYTES[2]))
        else:
            arrays = self._arrays(frames=np.full((count, side, side, 3), 128, np.uint8))
        return Loaded(arrays, side, side, reason=reason)

    def _arrays(self, *, encoded: Arrays | None = None, frames: NDArray[np.uint8] | None = None) -> Arrays:
        """What the decoding's graph takes, from the one of the two that is given."""
        both = (*(encoded or NO_BYTES), NO_FRAMES if frames is None else frames)
        if self.decoding.name == "hybrid":
            return (*both, np.array(encoded is not None, np.int32))
        return both[-1:] if self.decoding.name == "pyav" else both[:-1]


def _die_with_parent() -> None:
    """Have the kernel kill this worker when the process that started it dies, however it dies.

    Without, a run that is killed hard leaves its workers behind, waiting for ever.
    """
    if multiprocessing.parent_process() is not None and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _is_long(path: Path, row: Row) -> bool:
    """Whether the file had better stay where it is: a recording of hours does not belong into memory."""
    try:
        return row.length == 0 and path.stat().st_size > LONG_FILE
    except OSError as error:
        raise VideoDefect(f"cannot be read: {error.strerror}") from error


def _read_bytes(path: Path, row: Row) -> bytes:
    """The sample's bytes: the whole file, or its piece of a shard."""
    try:
        with open(path, "rb") as file:
            file.seek(row.offset)
            data = file.read(row.length or -1)
    except OSError as error:
        raise VideoDefect(f"cannot be read: {error.strerror}") from error
    if not data:
        raise VideoDefect("is empty (0 bytes)")
    if row.length and len(data) < row.length:
        raise VideoDefect(f"shard ends after {len(data)} of {row.length} bytes")
    return data


def _cut(frames: NDArray[Any], window: NDArray[np.int32]) -> NDArray[Any]:  # T H W 3 -> T h w 3
    top, left, bottom, right = window
    return frames[:, top:bottom, left:right]


def _about(request: Request, loaded: Loaded) -> Arrays:
    """(Sample, label, valid); why it is bad in UTF-8, one zero byte where it is not; its `Cost`, and its
    bytes.
    """
    valid = request.row is not None and not loaded.reason
    label = request.row.label if request.row is not None else -1
    return (
        np.array([request.sample, label, valid], np.int64),
        np.frombuffer(loaded.reason.encode() or b"\0", np.uint8),
        np.array([*astuple(loaded.cost), sum(array.nbytes for array in loaded.arrays)], np.float64),
    )


@dataclass
class TrainSource:
    """Training samples of one rank, from a step on, micro-batch after micro-batch.

    micro_batch: clips per rank and forward pass, a multiple of the plan's repeats: each sample is read and
    decoded once for all its repeats. A global batch is laid out accumulation-major, then rank, so the same
    clips meet in a global batch however many ranks share it. first: the micro-batch, counted from step 0, to
    begin with.
    """

    reader: Reader
    plan: TrainPlan
    clip: TrainClip
    micro_batch: int
    rank: int
    world_size: int
    first: int

    @property
    def samples(self) -> int:
        """Samples of a micro-batch."""
        return self.micro_batch // self.plan.repeats

    @property
    def cuts(self) -> bool:
        """Whether the graph has to cut each clip's window out of the frames it gets."""
        return self.plan.repeats > 1 or self.reader.decoding.name != "pyav"

    @property
    def numbers(self) -> int:
        """How many arrays of numbers the graph gets: for each repeat a window, if it cuts, and the clip's."""
        return self.plan.repeats * (self.clip.numbers + self.cuts)

    @property
    def clips_per_sample(self) -> int:
        return self.plan.repeats

    @property
    def output_bytes(self) -> int:
        """Of a micro-batch of clips."""
        return self.micro_batch * self.clip.frames * 3 * self.clip.size**2 * FLOAT

    def request(self, position: int) -> Request:
        """What is wanted at a position, counted in samples from `first` on."""
        return self._place(position)[0]

    def __call__(self, info: SampleInfo) -> Arrays:
        request, draws = self._place(info.idx_in_epoch)
        loaded = self.reader.load(request)
        if loaded.reason:
            draws = self._draws(info.idx_in_epoch, request.row, loaded.height, loaded.width)
            if not self.cuts:
                loaded = replace(loaded, arrays=(_cut(loaded.arrays[0], draws[0].window),))
        top, left = loaded.origin
        numbers: list[NDArray[Any]] = []
        for draw in draws:
            if self.cuts:
                numbers.append((draw.window - np.array([top, left, top, left])).astype(np.int32))
            numbers += draw.numbers
        return (*loaded.arrays, *_about(request, loaded), *numbers)

    def _place(self, position: int) -> tuple[Request, list[ClipDraw]]:
        step, place = self._slot_place(position)
        turn = (step * self.plan.global_batch + place) // self.plan.repeats
        sample = self.plan.slot(step, place).sample
        row = self.reader.dataset.row(sample)
        draws = self._draws(position, row, row.height, row.width)
        windows = np.array([draw.window for draw in draws])
        (top, left), (bottom, right) = windows[:, :2].min(axis=0), windows[:, 2:].max(axis=0)
        window = (int(top), int(left), int(bottom), int(right))
        return Request(sample, row, draws[0].indices, window, self.reader.decoding.in_graph(turn)), draws

    def _draws(self, position: int, row: Row | None, height: int, width: int) -> list[ClipDraw]:
        """One draw for each repeat, for frames of this size."""
        step, place = self._slot_place(position)
        slots = [self.plan.slot(step, place + repeat) for repeat in range(self.plan.repeats)]
        return [
            draw_clip(
                self.clip,
                seed=self.plan.seed,
                epoch=slot.epoch,
                sample=slot.draw,
                repeat=slot.repeat,
                frames=row.frames if row is not None else 1,
                height=height,
                width=width,
            )
            for slot in slots
        ]

    def _slot_place(self, position: int) -> tuple[int, int]:
        """The step, and the place in its global batch, of a sample's first repeat."""
        micro, inside = divmod(position, self.samples)
        step, accumulated = divmod(
            self.first + micro, self.plan.global_batch // (self.micro_batch * self.world_size)
        )
        place = (accumulated * self.world_size + self.rank) * self.micro_batch
        return step, place + inside * self.plan.repeats


@dataclass
class ViewSource:
    """All views of each video, every video once per pass; the passes follow one another without a gap.

    first: the batch, counted over all passes, to begin with.
    """

    reader: Reader
    plan: ViewPlan
    clip: ViewClip
    rank: int
    first: int = 0

    @property
    def samples(self) -> int:
        """Samples of a batch."""
        return self.plan.batch

    @property
    def numbers(self) -> int:
        """How many arrays of numbers the graph gets: the size to resize to, and where the crops lie."""
        return 2

    @property
    def clips_per_sample(self) -> int:
        return self.clip.views

    @property
    def output_bytes(self) -> int:
        """Of a batch of views."""
        return self.plan.batch * self.clip.views * self.clip.frames * 3 * self.clip.size**2 * FLOAT

    def request(self, position: int) -> Request:
        """What is wanted at a position, counted in samples from `first` on."""
        batch, place = divmod(self.first * self.plan.batch + position, self.plan.batch)
        sample = self.plan.sample(self.rank, batch % self.plan.batches, place)
        row = self.reader.dataset.row(sample) if sample >= 0 else None
        frames = row.frames if row is not None else 1
        indices = view_indices(frames, self.clip.frames, self.clip.clips).reshape(-1)
        return Request(sample, row, indices, None, self.reader.decoding.in_graph(sample))

    def __call__(self, info: SampleInfo) -> Arrays:
        request = self.request(info.idx_in_epoch)
        loaded = self.reader.load(request)
        scale = self.clip.size / min(loaded.height, loaded.width)
        resized = np.array([int(loaded.height * scale), int(loaded.width * scale)], np.float32)
        return (
            *loaded.arrays,
            *_about(request, loaded),
            np.maximum(resized, self.clip.size),
            crop_positions(self.clip.crops, loaded.height, loaded.width),
        )


Source = TrainSource | ViewSource


def crop_positions(crops: int, height: int, width: int) -> NDArray[np.float32]:
    """Where the crops lie along the longer side, as (crops, 2) shares of the free room in y and x."""
    along = np.array([0.5]) if crops == 1 else np.linspace(0.0, 1.0, crops)
    middle = np.full(crops, 0.5)
    pair = (middle, along) if width >= height else (along, middle)
    return np.stack(pair, axis=1).astype(np.float32)
