"""Baseline loaders: a PyTorch DataLoader over videos, read with decord, PyAV or torchcodec.

Each in the fastest form found: one thread per worker, no copy of the frames, one index of the file per clip,
batches collated in the workers' shared memory.
"""

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch.utils.data import DataLoader, Dataset, Sampler

from pipelines.augment.rand_augment import parse_policy
from pipelines.benchmark.libraries import require_library
from pipelines.benchmark.torchvision_augment import crop_and_normalise, crop_to_uint8, rand_augment_clip
from pipelines.benchmark.workload import Workload
from pipelines.dataset.manifest import Manifest, ManifestRow
from pipelines.sampling.sampler import TrainSampler
from pipelines.sampling.temporal import train_indices

Source = str | bytes
ReadFrames = Callable[[Source, list[int]], torch.Tensor]
"""A video and ascending frame numbers → T 3 H W, uint8."""


def read_pyav(source: Source, indices: list[int]) -> torch.Tensor:
    """PyAV: lists the file's packets once, then decodes only the groups of pictures with a wanted frame."""
    with av.open(BytesIO(source) if isinstance(source, bytes) else source) as container:
        stream = container.streams.video[0]
        packets = [p for p in container.demux(stream) if p.pts is not None and p.size]
        times = sorted(packet.pts for packet in packets)
        keyframes = sorted(packet.pts for packet in packets if packet.is_keyframe)
        stream.thread_type = "NONE"
        converter = VideoReformatter()
        pictures: dict[int, np.ndarray] = {}
        decoded: Iterator[av.VideoFrame] = iter(())
        position = -1 << 62  # time of the last decoded frame
        for index in indices:
            time = times[index]
            keyframe = keyframes[max(0, bisect_right(keyframes, time) - 1)]
            if keyframe > position:
                container.seek(keyframe, stream=stream)
                decoded = container.decode(stream)
            while position < time:
                frame = next(decoded)
                position = frame.pts if frame.pts is not None else position
            if time not in pictures:
                pictures[time] = converter.reformat(frame, format="rgb24").to_ndarray()
    return torch.from_numpy(np.stack([pictures[times[index]] for index in indices])).permute(0, 3, 1, 2)


def read_decord(source: Source, indices: list[int]) -> torch.Tensor:
    """decord, as its maintained fork decord2."""
    decord = import_module("decord")
    file = BytesIO(source) if isinstance(source, bytes) else source
    frames = decord.VideoReader(file, ctx=decord.cpu(0), num_threads=1).get_batch(indices).asnumpy()
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


def read_torchcodec(source: Source, indices: list[int]) -> torch.Tensor:
    """torchcodec, frame-exact."""
    decoders = import_module("torchcodec.decoders")
    decoder = decoders.VideoDecoder(source, seek_mode="exact", num_ffmpeg_threads=1)
    frames: torch.Tensor = decoder.get_frames_at(indices).data
    return frames


@dataclass(frozen=True)
class VideoReader:
    """A library that reads frames."""

    read: ReadFrames
    """Decodes the frames of a clip."""
    distribution: str
    """The package to install."""
    module: str
    """The module to import."""
    hands_over_uint8: bool = False
    """Whether clips are left to be normalised on the device."""


VIDEO_READERS = {
    "decord": VideoReader(read_decord, "decord2", "decord"),
    "PyAV": VideoReader(read_pyav, "av", "av"),
    "torchcodec": VideoReader(read_torchcodec, "torchcodec", "torchcodec.decoders"),
    "torchcodec, uint8": VideoReader(read_torchcodec, "torchcodec", "torchcodec.decoders", True),
}


class ClipDataset(Dataset[tuple[torch.Tensor, int]]):
    """Training clips by row of the manifest: (3, T, size, size), float32 or uint8, and the label."""

    def __init__(self, workload: Workload, reader: VideoReader) -> None:
        self._workload = workload
        self._manifest = Manifest.open(workload.manifest)
        self._read = reader.read
        self._crop = crop_to_uint8 if reader.hands_over_uint8 else crop_and_normalise
        self._policy = parse_policy(workload.rand_augment) if workload.rand_augment else None

    def __len__(self) -> int:
        return len(self._manifest)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        row = self._manifest.row(index)
        rng = np.random.default_rng(random.getrandbits(64))
        indices = row.first_frame + train_indices(row.frames, self._workload.frames, rng)
        clip = self._read(self._source(row), indices.tolist())
        if self._policy:
            clip = rand_augment_clip(clip, self._policy, rng)
        return self._crop(clip, self._workload.size, rng), row.label

    def _source(self, row: ManifestRow) -> Source:
        path: Path = self._manifest.absolute_path(row)
        if row.length == 0:
            return str(path)
        with open(path, "rb") as file:
            file.seek(row.offset)
            return file.read(row.length)


class TrainBatches(Sampler[list[int]]):
    """The batches of this project's loader, without end."""

    def __init__(self, sampler: TrainSampler) -> None:
        self._sampler = sampler

    def __iter__(self) -> Iterator[list[int]]:
        for step in count():
            yield [self._sampler.slot(step, index).sample for index in range(self._sampler.global_batch)]


def open_dataloader(name: str, workload: Workload, workers: int) -> Any:
    """The DataLoader with the video reader `name`; yields (clips, labels) without end.

    Raises LibraryUnavailable where its library is missing.
    """
    reader = VIDEO_READERS[name]
    require_library(reader.module, reader.distribution)
    clips = ClipDataset(workload, reader)
    batches = TrainBatches(TrainSampler(len(clips), workload.batch, workload.seed))
    return DataLoader(clips, batch_sampler=batches, num_workers=workers, persistent_workers=True)
