"""The DALI external sources: which sample stands where, read, and handed over with its numbers from the plan.

They run in DALI's worker processes and are stateless: the sample follows from the position alone. What is
handed over, in this order: what the decoding asks for (`Decoding.layouts`), who the sample is, why it is bad,
what it cost, and the numbers of the graph. Importing this module must stay cheap: every worker does it.
"""

from dataclasses import astuple, dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.augment.params import ClipParams, TrainClipSpec, ViewSpec, draw_clip_params
from pipelines.dali.encoded_input import PLACEHOLDER_SIZE
from pipelines.dali.sample_reader import Arrays, LoadedSample, SampleReader, SampleRequest
from pipelines.dataset.manifest import ManifestRow
from pipelines.formatting import printable
from pipelines.sampling.sampler import Slot, TrainSampler, ViewSampler
from pipelines.sampling.temporal import view_indices

FLOAT = 4  # bytes


class SampleInfo(Protocol):
    """What DALI tells a source about the sample it wants."""

    idx_in_epoch: int


def _cut(frames: NDArray[Any], window: NDArray[np.int32]) -> NDArray[Any]:  # T H W 3 -> T h w 3
    top, left, bottom, right = window
    return frames[:, top:bottom, left:right]


def _about(request: SampleRequest, loaded: LoadedSample, keys: list[int]) -> Arrays:
    """(Sample, label, valid, and the mask key of each clip made of it); why it is bad in UTF-8, one zero byte
    where it is not; its `SampleCost`, and its bytes.
    """
    valid = request.row is not None and not loaded.reason
    label = request.row.label if request.row is not None else -1
    return (
        np.array([request.sample, label, valid, *keys], np.int64),
        np.frombuffer(printable(loaded.reason).encode() or b"\0", np.uint8),
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

    reader: SampleReader
    sampler: TrainSampler
    clip: TrainClipSpec
    micro_batch: int
    rank: int
    world_size: int
    first: int

    @property
    def samples(self) -> int:
        """Samples of a micro-batch."""
        return self.micro_batch // self.sampler.repeats

    @property
    def cuts(self) -> bool:
        """Whether the graph has to cut each clip's window out of the frames it gets."""
        return self.sampler.repeats > 1 or self.reader.decoding.name != "pyav"

    @property
    def numbers(self) -> int:
        """How many arrays of numbers the graph gets: for each repeat a window, if it cuts, and the clip's."""
        return self.sampler.repeats * (self.clip.array_count + self.cuts)

    @property
    def clips_per_sample(self) -> int:
        return self.sampler.repeats

    @property
    def output_bytes(self) -> int:
        """Of a micro-batch of clips."""
        return self.micro_batch * self.clip.frames * 3 * self.clip.size**2 * FLOAT

    def request(self, position: int) -> SampleRequest:
        """What is wanted at a position, counted in samples from `first` on."""
        return self._place(position)[0]

    def __call__(self, info: SampleInfo) -> Arrays:
        request, slots, draws = self._place(info.idx_in_epoch)
        loaded = self.reader.load(request)
        if loaded.reason:
            draws = self._draws(slots, request.row, loaded.height, loaded.width)
            if not self.cuts:
                loaded = replace(loaded, arrays=(_cut(loaded.arrays[0], draws[0].roi),))
        top, left = loaded.origin
        numbers: list[NDArray[Any]] = []
        for draw in draws:
            if self.cuts:
                numbers.append((draw.roi - np.array([top, left, top, left])).astype(np.int32))
            numbers += draw.arrays
        keys = [self.sampler.mask_key(slot) for slot in slots]
        return (*loaded.arrays, *_about(request, loaded, keys), *numbers)

    def _place(self, position: int) -> tuple[SampleRequest, list[Slot], list[ClipParams]]:
        """What is wanted at a position, and of each of its repeats the slot and the draw."""
        step, place = self._slot_place(position)
        turn = (step * self.sampler.global_batch + place) // self.sampler.repeats
        slots = [self.sampler.slot(step, place + repeat) for repeat in range(self.sampler.repeats)]
        sample = slots[0].sample
        row, reason = self.reader.row(sample)
        height, width = (row.height, row.width) if row is not None else (PLACEHOLDER_SIZE, PLACEHOLDER_SIZE)
        draws = self._draws(slots, row, height, width)
        windows = np.array([draw.roi for draw in draws])
        (top, left), (bottom, right) = windows[:, :2].min(axis=0), windows[:, 2:].max(axis=0)
        window = (int(top), int(left), int(bottom), int(right))
        in_graph = self.reader.decoding.in_graph(turn)
        request = SampleRequest(sample, row, draws[0].indices, window, in_graph, reason)
        return request, slots, draws

    def _draws(self, slots: list[Slot], row: ManifestRow | None, height: int, width: int) -> list[ClipParams]:
        """One draw for each repeat, for frames of this size."""
        return [
            draw_clip_params(
                self.clip,
                seed=self.sampler.seed,
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
            self.first + micro, self.sampler.global_batch // (self.micro_batch * self.world_size)
        )
        place = (accumulated * self.world_size + self.rank) * self.micro_batch
        return step, place + inside * self.sampler.repeats


@dataclass
class ViewSource:
    """All views of each video, every video once per pass; the passes follow one another without a gap.

    first: the batch, counted over all passes, to begin with.
    """

    reader: SampleReader
    sampler: ViewSampler
    clip: ViewSpec
    rank: int
    first: int = 0

    @property
    def samples(self) -> int:
        """Samples of a batch."""
        return self.sampler.batch

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
        return self.sampler.batch * self.clip.views * self.clip.frames * 3 * self.clip.size**2 * FLOAT

    def request(self, position: int) -> SampleRequest:
        """What is wanted at a position, counted in samples from `first` on."""
        batch, place = divmod(self.first * self.sampler.batch + position, self.sampler.batch)
        sample = self.sampler.sample(self.rank, batch % self.sampler.batches, place)
        row, reason = self.reader.row(sample) if sample >= 0 else (None, "")
        frames = row.frames if row is not None else 1
        indices = view_indices(frames, self.clip.frames, self.clip.clips).reshape(-1)
        return SampleRequest(sample, row, indices, None, self.reader.decoding.in_graph(sample), reason)

    def __call__(self, info: SampleInfo) -> Arrays:
        request = self.request(info.idx_in_epoch)
        loaded = self.reader.load(request)
        return (
            *loaded.arrays,
            *_about(request, loaded, [0]),
            *view_numbers(self.clip, loaded.height, loaded.width),
        )


Source = TrainSource | ViewSource


def view_numbers(clip: ViewSpec, height: int, width: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What the graph of the views takes beside frames of `height` x `width` pixels: the size to resize them
    to, (2,), and where the crops lie, (crops, 2).
    """
    scale = clip.size / min(height, width)
    resized = np.array([int(height * scale), int(width * scale)], np.float32)
    return np.maximum(resized, clip.size), crop_positions(clip.crops, height, width)


def crop_positions(crops: int, height: int, width: int) -> NDArray[np.float32]:
    """Where the crops lie along the longer side, as (crops, 2) shares of the free room in y and x."""
    along = np.array([0.5]) if crops == 1 else np.linspace(0.0, 1.0, crops)
    middle = np.full(crops, 0.5)
    pair = (middle, along) if width >= height else (along, middle)
    return np.stack(pair, axis=1).astype(np.float32)
