"""The DALI external sources: a position in a rank's stream → the sample there, read, as arrays of its layout.

They run in DALI's worker processes and are stateless: a sample follows from its position alone. Every worker
imports this module, so it imports neither torch nor DALI.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.augment.params import ClipParams, TrainClipSpec, ViewSpec, draw_clip_params, placeholder_params
from pipelines.dali.encoded_input import PLACEHOLDER_SIZE
from pipelines.dali.sample_layout import Arrays, SampleLayout, record_dtype, train_layout, view_layout
from pipelines.dali.sample_reader import LoadedSample, SampleReader, SampleRequest, Window
from pipelines.formatting import printable
from pipelines.sampling.sampler import Slot, TrainSampler, ViewSampler
from pipelines.sampling.temporal import view_indices

FLOAT = 4  # bytes


class SampleInfo(Protocol):
    """DALI's argument of a source."""

    idx_in_epoch: int


@dataclass
class TrainSource:
    """Training samples of one rank from a step on, micro-batch after micro-batch.

    A global batch is laid out by accumulation step, then by rank, so it holds the same clips however many
    ranks share it.
    """

    reader: SampleReader
    sampler: TrainSampler
    clip: TrainClipSpec
    micro_batch: int
    """Clips per rank and forward pass, a multiple of the sampler's repeats: a sample is read and decoded once
    for all its repeats."""
    rank: int
    world_size: int
    first: int
    """The micro-batch to begin with, counted from step 0."""

    @property
    def samples(self) -> int:
        """Samples of a micro-batch."""
        return self.micro_batch // self.sampler.repeats

    @property
    def clips_per_sample(self) -> int:
        return self.sampler.repeats

    @property
    def crops_in_graph(self) -> bool:
        """Whether the graph crops the frames to each clip's ROI; otherwise PyAV does."""
        return self.sampler.repeats > 1 or self.reader.decoding.name != "pyav"

    @cached_property
    def layout(self) -> SampleLayout:
        return train_layout(self.reader.decoding.name, self.clip, crops_in_graph=self.crops_in_graph)

    @cached_property
    def record(self) -> np.dtype[np.void]:
        """Of the layout's array `record`."""
        return record_dtype(self.sampler.repeats)

    @property
    def output_bytes(self) -> int:
        """Of a micro-batch of clips."""
        return self.micro_batch * self.clip.frames * 3 * self.clip.size**2 * FLOAT

    def request(self, position: int) -> SampleRequest:
        """Which sample is at a position, counted in samples from `first` on."""
        return self.sample(position)[0]

    def sample(self, position: int) -> tuple[SampleRequest, list[Slot], list[ClipParams]]:
        """The same, and of each of its repeats the slot and the augmentation parameters."""
        step, index = self._slot_index(position)
        slots = [self.sampler.slot(step, index + repeat) for repeat in range(self.sampler.repeats)]
        sample = slots[0].sample
        row, reason = self.reader.row(sample)
        size = (PLACEHOLDER_SIZE,) * 2
        frames, (height, width) = (1, size) if row is None else (row.frames, self.reader.frame_size(row))
        params = [
            draw_clip_params(
                self.clip,
                seed=self.sampler.seed,
                epoch=slot.epoch,
                sample=slot.draw,
                repeat=slot.repeat,
                frames=frames,
                height=height,
                width=width,
            )
            for slot in slots
        ]
        in_graph = self.reader.decoding.in_graph(
            (step * self.sampler.global_batch + index) // self.sampler.repeats
        )
        request = SampleRequest(sample, row, params[0].indices, _union(params), in_graph, reason)
        return request, slots, params

    def __call__(self, info: SampleInfo) -> tuple[NDArray[Any], ...]:
        request, slots, params = self.sample(info.idx_in_epoch)
        loaded = self.reader.load(request)
        arrays = dict(loaded.arrays)
        if loaded.reason and request.row is not None:  # the parameters are for frames of the video's size
            params = [placeholder_params(self.clip, PLACEHOLDER_SIZE)] * len(slots)
        elif loaded.reason and not self.crops_in_graph:
            top, left, bottom, right = params[0].roi
            arrays["frames"] = arrays["frames"][:, top:bottom, left:right]
        arrays["roi"] = np.array([each.roi for each in params], np.int32) - np.array(
            loaded.origin * 2, np.int32
        )
        for name in params[0].arrays:
            arrays[name] = np.array([each.arrays[name] for each in params])
        keys = [self.sampler.mask_key(slot) for slot in slots]
        return self.layout.pack(arrays | _about(request, loaded, keys, self.record))

    def _slot_index(self, position: int) -> tuple[int, int]:
        """The step, and the index in its global batch, of a sample's first repeat."""
        micro, inside = divmod(position, self.samples)
        step, accumulated = divmod(
            self.first + micro, self.sampler.global_batch // (self.micro_batch * self.world_size)
        )
        index = (accumulated * self.world_size + self.rank) * self.micro_batch
        return step, index + inside * self.sampler.repeats


@dataclass
class ViewSource:
    """All views of each video, every video once per pass, pass after pass."""

    reader: SampleReader
    sampler: ViewSampler
    clip: ViewSpec
    rank: int
    first: int = 0
    """The batch to begin with, counted over all passes."""

    @property
    def samples(self) -> int:
        """Samples of a batch."""
        return self.sampler.batch

    @property
    def clips_per_sample(self) -> int:
        return self.clip.views

    @cached_property
    def layout(self) -> SampleLayout:
        return view_layout(self.reader.decoding.name)

    @cached_property
    def record(self) -> np.dtype[np.void]:
        """Of the layout's array `record`."""
        return record_dtype(keys=1)

    @property
    def output_bytes(self) -> int:
        """Of a batch of views."""
        return self.sampler.batch * self.clip.views * self.clip.frames * 3 * self.clip.size**2 * FLOAT

    def request(self, position: int) -> SampleRequest:
        """Which video is at a position, counted in samples from `first` on."""
        batch, index = divmod(self.first * self.sampler.batch + position, self.sampler.batch)
        sample = self.sampler.sample(self.rank, batch % self.sampler.batches, index)
        row, reason = self.reader.row(sample) if sample >= 0 else (None, "")
        frames = row.frames if row is not None else 1
        indices = view_indices(frames, self.clip.frames, self.clip.clips).reshape(-1)
        return SampleRequest(sample, row, indices, None, self.reader.decoding.in_graph(sample), reason)

    def __call__(self, info: SampleInfo) -> tuple[NDArray[Any], ...]:
        request = self.request(info.idx_in_epoch)
        loaded = self.reader.load(request)
        views = view_arrays(self.clip, loaded.height, loaded.width)
        return self.layout.pack(loaded.arrays | views | _about(request, loaded, [0], self.record))


Source = TrainSource | ViewSource


def _union(params: Sequence[ClipParams]) -> Window:
    """The smallest window that holds the ROI of each clip."""
    tops, lefts, bottoms, rights = zip(*(each.roi.tolist() for each in params), strict=True)
    return min(tops), min(lefts), max(bottoms), max(rights)


def _about(
    request: SampleRequest, loaded: LoadedSample, keys: Sequence[int], record: np.dtype[np.void]
) -> Arrays:
    """The arrays for the loader."""
    row = request.row
    label, valid = (-1, False) if row is None else (row.label, not loaded.reason)
    size = sum(array.nbytes for array in loaded.arrays.values())
    values = np.array([(request.sample, label, valid, keys, *astuple(loaded.cost), size)], record)
    reason = printable(loaded.reason).encode() or b"\0"
    return {"record": values.view(np.uint8), "reason": np.frombuffer(reason, np.uint8)}


def view_arrays(clip: ViewSpec, height: int, width: int) -> Arrays:
    """The inputs of the view graph beside frames of `height` x `width` pixels: `sample_layout.VIEWS`."""
    scale = clip.size / min(height, width)
    resized = np.array([int(height * scale), int(width * scale)], np.float32)
    return {
        "view_size": np.maximum(resized, clip.size),
        "crop_positions": crop_positions(clip.crops, height, width),
    }


def crop_positions(crops: int, height: int, width: int) -> NDArray[np.float32]:
    """Positions of the crops: (crops, 2), y and x, from 0 (top, left) to 1 (bottom, right). They are evenly
    spaced along the longer side and centred along the other.
    """
    along = np.array([0.5]) if crops == 1 else np.linspace(0.0, 1.0, crops)
    middle = np.full(crops, 0.5)
    pair = (middle, along) if width >= height else (along, middle)
    return np.stack(pair, axis=1).astype(np.float32)
