"""The DALI external sources: they read and decode a sample and hand it over with its numbers from the plan.

They run in DALI's worker processes, are stateless (the sample follows from the position alone) and never
raise: an exception in a worker would end it for good and does not say which file was bad. A bad file becomes
a stand-in clip with `valid` 0 and a reason in words.

Importing this module must stay cheap: every worker does it.
"""

import ctypes
import logging
import multiprocessing
import signal
import sys
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from . import VideoDefect
from .draw import TrainClip, ViewClip, draw_clip
from .encoded import STAND_IN_SIZE, check_encoded, stand_in
from .frames import view_indices
from .manifest import Manifest, Row
from .plan import TrainPlan, ViewPlan
from .pyav_decode import decode_frames

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

Arrays = tuple[NDArray[Any], ...]


class SampleInfo(Protocol):
    """What DALI tells a source about the sample it wants."""

    idx_in_epoch: int


@dataclass(frozen=True)
class Loaded:
    """A sample read from disk: arrays for the graph, its frame size in pixels, why it is bad if it is."""

    arrays: Arrays
    height: int
    width: int
    reason: str = ""


@dataclass
class Reader:
    """Reads samples of one manifest, as decoded frames (`pyav`) or as bytes for the graph (`dali`).

    manifest: travels to a worker as its path and fingerprint, and is mapped anew there. decoder: `pyav` or
    `dali`. codecs: what the graph's decoder takes; empty for pyav, which takes all.
    """

    manifest: Manifest
    decoder: str
    codecs: frozenset[str] = frozenset()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What a worker process begins with."""
        _die_with_parent()
        self.__dict__.update(state)

    def load(self, row: Row | None, indices: NDArray[np.int32]) -> Loaded:
        """Read the frames at `indices`; `row` None (a place without a sample) gives the stand-in."""
        if row is None:
            return self._stand_in(len(indices), "")
        try:
            return self._read(row, indices)
        except VideoDefect as defect:
            return self._stand_in(len(indices), str(defect))
        except Exception as error:
            logging.getLogger(__name__).exception("unforeseen error while reading %s", row.path)
            return self._stand_in(len(indices), f"{type(error).__name__}: {error}")

    def _read(self, row: Row, indices: NDArray[np.int32]) -> Loaded:
        path = self.manifest.absolute_path(row)
        whole_file = row.length == 0
        if self.decoder == "pyav":
            frames = decode_frames(path if whole_file else _read_bytes(path, row), indices)
            if frames.shape[1:3] != (row.height, row.width):
                raise VideoDefect(
                    f"has frames of {frames.shape[2]}x{frames.shape[1]}, the manifest says "
                    f"{row.width}x{row.height}; the file changed since: make the manifest anew"
                )
            return Loaded((frames,), row.height, row.width)
        data = _read_bytes(path, row)
        check_encoded(data, row, int(indices.max()), self.codecs)
        return Loaded((np.frombuffer(data, np.uint8), indices), row.height, row.width)

    def _stand_in(self, frames: int, reason: str) -> Loaded:
        side = STAND_IN_SIZE
        if self.decoder == "pyav":
            return Loaded((np.full((frames, side, side, 3), 128, np.uint8),), side, side, reason)
        data = np.frombuffer(stand_in(self.codecs), np.uint8)
        return Loaded((data, np.zeros(frames, np.int32)), side, side, reason)


def _die_with_parent() -> None:
    """Have the kernel kill this worker when the process that started it dies, however it dies.

    Without, a run that is killed hard leaves its workers behind, waiting for ever.
    """
    if multiprocessing.parent_process() is not None and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _read_bytes(path: Any, row: Row) -> bytes:
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


def _identity(sample: int, label: int, valid: bool, reason: str) -> Arrays:
    """Who a clip is: (sample, label, valid), and the reason in UTF-8, one zero byte if there is none."""
    text = np.frombuffer(reason.encode() or b"\0", np.uint8)
    return np.array([sample, label, valid], np.int64), text


@dataclass
class TrainSource:
    """Training clips of one rank, from `first_step` on, micro-batch after micro-batch.

    micro_batch: clips per rank and forward pass. A global batch is laid out accumulation-major, then rank,
    so the same clips meet in a global batch however many ranks share it.
    """

    reader: Reader
    plan: TrainPlan
    clip: TrainClip
    micro_batch: int
    rank: int
    world_size: int
    first_step: int

    def __call__(self, info: SampleInfo) -> Arrays:
        micro, place = divmod(info.idx_in_epoch, self.micro_batch)
        step, accumulated = divmod(micro, self.plan.global_batch // (self.micro_batch * self.world_size))
        place += (accumulated * self.world_size + self.rank) * self.micro_batch
        slot = self.plan.slot(self.first_step + step, place)
        row = self.reader.manifest.row(slot.sample)

        def draw(height: int, width: int) -> Any:
            return draw_clip(
                self.clip,
                seed=self.plan.seed,
                epoch=slot.epoch,
                sample=slot.sample,
                repeat=slot.repeat,
                frames=row.frames,
                height=height,
                width=width,
            )

        drawn = draw(row.height, row.width)
        loaded = self.reader.load(row, drawn.indices)
        if loaded.reason:
            drawn = draw(loaded.height, loaded.width)
        return (
            *loaded.arrays,
            *_identity(slot.sample, row.label, not loaded.reason, loaded.reason),
            drawn.crop,
            np.array(drawn.flip, np.int32),
            *([drawn.jitter] if self.clip.color_jitter else []),
            *([drawn.operations, drawn.arguments] if self.clip.operations else []),
        )


@dataclass
class ViewSource:
    """All views of each video, every video once per pass; the passes follow one another without a gap."""

    reader: Reader
    plan: ViewPlan
    clip: ViewClip
    rank: int

    def __call__(self, info: SampleInfo) -> Arrays:
        batch, place = divmod(info.idx_in_epoch, self.plan.batch)
        sample = self.plan.sample(self.rank, batch % self.plan.batches, place)
        row = self.reader.manifest.row(sample) if sample >= 0 else None
        frames = row.frames if row is not None else 1
        indices = view_indices(frames, self.clip.frames, self.clip.clips).reshape(-1)
        loaded = self.reader.load(row, indices)
        valid = row is not None and not loaded.reason
        scale = self.clip.size / min(loaded.height, loaded.width)
        resized = np.array([int(loaded.height * scale), int(loaded.width * scale)], np.float32)
        return (
            *loaded.arrays,
            *_identity(sample, row.label if row is not None else -1, valid, loaded.reason),
            np.maximum(resized, self.clip.size),
            crop_positions(self.clip.crops, loaded.height, loaded.width),
        )


def crop_positions(crops: int, height: int, width: int) -> NDArray[np.float32]:
    """Where the crops lie along the longer side, as (crops, 2) shares of the free room in y and x."""
    along = np.array([0.5]) if crops == 1 else np.linspace(0.0, 1.0, crops)
    middle = np.full(crops, 0.5)
    pair = (middle, along) if width >= height else (along, middle)
    return np.stack(pair, axis=1).astype(np.float32)
