"""Views of decoded frames, made in this process by the same graph nodes as those of an evaluation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.augment.params import ViewSpec
from pipelines.dali.buffers import InUseBuffers
from pipelines.dali.external_source import view_arrays
from pipelines.dali.pipeline import Colours, external_arrays, make_pipeline, view_nodes
from pipelines.dali.sample_layout import FRAMES, VIEWS, SampleLayout
from pipelines.dataset.manifest import ManifestRow
from pipelines.dataset.source import open_source
from pipelines.errors import unexpected_as_video_error
from pipelines.sampling.temporal import view_indices

_LAYOUT = SampleLayout((FRAMES, *VIEWS))


class FrameViews:
    """Makes views of given frames, with a pipeline that is built once."""

    def __init__(
        self, clip: ViewSpec, mean: Colours, std: Colours, device: torch.device, batch: int, threads: int
    ) -> None:
        """device: of the views. batch: videos at once, at most."""
        self.clip = clip
        self.batch = batch
        self._buffers = InUseBuffers()
        self._samples: list[tuple[NDArray[Any], ...]] = []
        gpu = device.type == "cuda"

        def views() -> Any:
            nodes = external_arrays(_LAYOUT, self._batch_of_arrays, batch=True)
            frames = nodes["frames"].gpu() if gpu else nodes["frames"]
            return view_nodes(frames, nodes, clip, mean, std)

        self._pipeline = make_pipeline(views, batch=batch, threads=threads, device=device)
        self._pipeline.build()

    def __call__(self, videos: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
        """Views of up to `batch` videos, float32, (B, V, 3, T, H, W).

        videos: for each the frames of all its clips, one clip after another, (clips x T, h, w, 3) RGB.
        """
        self._samples = [
            _LAYOUT.pack(
                {"frames": np.ascontiguousarray(frames), **view_arrays(self.clip, *frames.shape[1:3])}
            )
            for frames in videos
        ]
        (views,) = self._pipeline.run()
        clips = torch.from_dlpack(views.as_tensor())
        self._buffers.hold(clips)
        copied = clips.clone()  # DALI reuses its buffer
        self._buffers.release_finished()
        return copied

    def _batch_of_arrays(self) -> tuple[list[NDArray[Any]], ...]:
        return tuple(map(list, zip(*self._samples, strict=True)))


def clip_frames(path: Path, row: ManifestRow, clip: ViewSpec) -> NDArray[np.uint8]:
    """The frames of all clips of a video, (clips x T, h, w, 3), as an evaluation decodes them.

    Raises VideoError where the video cannot be used.
    """
    indices = view_indices(row.frames, clip.frames, clip.clips).reshape(-1)
    with unexpected_as_video_error():
        frames = open_source(path, row).read(indices)
        return frames.decode(None, (row.height, row.width), clip.max_short_side)
