"""Scores sliding windows of a long video in one pass over its frames, with bounded memory."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.augment.params import ViewSpec
from pipelines.dali.frame_views import FrameViews
from pipelines.decode.frame_stream import FrameStream
from pipelines.errors import VideoError
from pipelines.sampling.sliding_windows import TimeWindow, sliding_windows
from pipelines.worker_pool import usable_cores
from trainer.errors import RunError
from trainer.inference.preprocessing import Preprocessing

MOST_WINDOWS = 1_000_000
MOST_BYTES = 2**33
"""Limit for the frames of a window and of the windows that overlap it."""
_FRAMES_AT_ONCE = 8

Item = TypeVar("Item")

ScoredWindow = tuple[TimeWindow, NDArray[np.float32], int]
"""A window, its scores (K,), and the number of windows."""


def scored_windows(
    path: Path,
    clip: ViewSpec,
    preprocessing: Preprocessing,
    score: Callable[[Tensor], NDArray[np.float32]],
    device: torch.device,
    *,
    length: float,
    stride: float,
    batch: int,
) -> Iterator[ScoredWindow]:
    """Yield each window of a video with its scores, in order of time.

    score: (B, V, 3, T, H, W) → (B, K). length, stride: in seconds. batch: windows per forward pass.

    Each frame is resized once. Memory holds the resized frames of the windows that overlap. Raises VideoError
    if the video, or the rest of it, is unusable, and RunError for invalid windows.
    """
    if not (0 < length < float("inf") and 0 < stride < float("inf")):
        raise RunError(f"windows of {length:g} s every {stride:g} s: both must be above 0")
    stream = FrameStream(path)
    if stream.duration / stride > MOST_WINDOWS:
        raise RunError(
            f"windows every {stride:g} s of {stream.duration:.0f} s are more than {MOST_WINDOWS:,}; use a "
            "larger stride"
        )
    windows = sliding_windows(stream.seconds, stream.duration, length, stride)
    wanted = np.zeros(stream.frames, np.bool_)
    for window in windows:
        wanted[window.indices(clip.frames, clip.clips)] = True
    need = _bytes_of_overlapping(windows, wanted, clip)
    if need > MOST_BYTES:
        raise RunError(
            f"windows of {length:g} s every {stride:g} s need {need / 2**30:.0f} GiB of memory, more than "
            f"{MOST_BYTES / 2**30:.0f}; use a larger stride"
        )
    made = _windows_of_views(stream, windows, wanted, clip, preprocessing, device)
    for ready in grouped(made, batch):
        scores = score(torch.stack([views for _, views in ready]))
        for (window, _), row in zip(ready, scores, strict=True):
            yield window, row, len(windows)


def _bytes_of_overlapping(windows: list[TimeWindow], wanted: NDArray[np.bool_], clip: ViewSpec) -> int:
    """The most bytes that the frames of overlapping windows take."""
    before = np.concatenate([[0], np.cumsum(wanted)])  # number of wanted frames before each frame
    first = np.array([window.first for window in windows])
    after = first + [window.frames for window in windows]
    return int((before[after] - before[first]).max()) * clip.crops * 3 * clip.size**2 * 4


def _windows_of_views(
    stream: FrameStream,
    windows: list[TimeWindow],
    wanted: NDArray[np.bool_],
    clip: ViewSpec,
    preprocessing: Preprocessing,
    device: torch.device,
) -> Iterator[tuple[TimeWindow, Tensor]]:  # V 3 T H W
    one = ViewSpec(1, clip.size, 1, clip.crops)
    colours = preprocessing.mean, preprocessing.std
    make = FrameViews(one, *colours, device, batch=_FRAMES_AT_ONCE, threads=usable_cores())
    kept: dict[int, Tensor] = {}
    number = 0  # index of the next window
    pictures = stream.pictures(wanted, preprocessing.max_short_side)
    for group in grouped(pictures, _FRAMES_AT_ONCE):
        views = make([picture[None] for _, picture in group])
        kept.update((frame, view) for (frame, _), view in zip(group, views, strict=True))
        while number < len(windows):
            window = windows[number]
            indices = window.indices(clip.frames, clip.clips).tolist()
            if max(indices) > group[-1][0]:
                break
            yield window, _assembled(kept, indices, clip)
            number += 1
            first = windows[number].first if number < len(windows) else stream.frames
            for old in [frame for frame in kept if frame < first]:
                del kept[old]


def grouped(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of `size` items. The last one, and one before a VideoError of `items`, may be shorter."""
    group: list[Item] = []
    try:
        for item in items:
            group.append(item)
            if len(group) == size:
                yield group
                group = []
    except VideoError:
        if group:
            yield group
        raise
    if group:
        yield group


def _assembled(kept: dict[int, Tensor], indices: list[int], clip: ViewSpec) -> Tensor:
    """The views of a window, (V, 3, T, H, W), ordered by clip, then by crop, like those of the graph."""
    clips = [indices[start : start + clip.frames] for start in range(0, len(indices), clip.frames)]
    return torch.cat([torch.cat([kept[number] for number in each], dim=2) for each in clips])
