"""A long video, window by window, in one pass over its frames and in bounded memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
"""Of the frames in one window and in those that overlap it."""
_FRAMES_AT_ONCE = 8

Item = TypeVar("Item")

ScoredWindow = tuple[TimeWindow, NDArray[np.float32], int]
"""A window, its scores (K,), and how many windows there are."""


@dataclass(frozen=True)
class WindowOptions:
    """length, stride: of the windows, in seconds. batch: windows that are scored at once."""

    length: float
    stride: float
    batch: int


def scored_windows(
    path: Path,
    slid: WindowOptions,
    clip: ViewSpec,
    preprocessing: Preprocessing,
    score: Callable[[Tensor], NDArray[np.float32]],
    device: torch.device,
) -> Iterator[ScoredWindow]:
    """Each window of a video with its scores, in the order of time.

    score: (B, V, 3, T, H, W) → (B, K).

    Each frame is resized once, however many windows it is in; what is kept is as many frames of the model's
    resolution as the windows over one moment have. Raises VideoError where the video cannot be used, or not
    from some frame on, and RunError for windows that cannot be.
    """
    length, stride = slid.length, slid.stride
    if not (0 < length < float("inf") and 0 < stride < float("inf")):
        raise RunError(f"windows of {length:g} s every {stride:g} s; both are above 0")
    stream = FrameStream(path)
    if stream.duration / stride > MOST_WINDOWS:
        raise RunError(
            f"windows every {stride:g} s of {stream.duration:.0f} s are more than {MOST_WINDOWS:,}; take a "
            "larger stride"
        )
    windows = sliding_windows(stream.seconds, stream.duration, length, stride)
    wanted = np.zeros(stream.frames, np.bool_)
    for window in windows:
        wanted[window.indices(clip.frames, clip.clips)] = True
    _check_memory(windows, wanted, clip, slid)
    made = _windows_of_views(stream, windows, wanted, clip, preprocessing, device)
    for ready in grouped(made, slid.batch):
        scores = score(torch.stack([views for _, views in ready]))
        for (window, _), row in zip(ready, scores, strict=True):
            yield window, row, len(windows)


def _check_memory(
    windows: list[TimeWindow], wanted: NDArray[np.bool_], clip: ViewSpec, slid: WindowOptions
) -> None:
    """Raises RunError for windows that overlap so much that the frames in one do not fit into memory."""
    before = np.concatenate([[0], np.cumsum(wanted)])  # how many are wanted before each frame
    first = np.array([window.first for window in windows])
    after = first + [window.frames for window in windows]
    need = int((before[after] - before[first]).max()) * clip.crops * 3 * clip.size**2 * 4
    if need > MOST_BYTES:
        raise RunError(
            f"windows of {slid.length:g} s every {slid.stride:g} s need {need / 2**30:.0f} GiB of memory, "
            f"more than {MOST_BYTES / 2**30:.0f}; take a larger stride"
        )


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
    number = 0  # of the window that is next
    for group in grouped(stream.pictures(wanted), _FRAMES_AT_ONCE):
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
    """Lists of `size` items; the last may be shorter, as may one after which `items` raises VideoError."""
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
    """The views of a window, by clip, then by crop, as the graph orders them: (V, 3, T, H, W)."""
    clips = [indices[start : start + clip.frames] for start in range(0, len(indices), clip.frames)]
    return torch.cat([torch.cat([kept[number] for number in each], dim=2) for each in clips])
