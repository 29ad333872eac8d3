"""Explanations of a prediction: class activation and the attention of the global blocks."""

import difflib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.attention_maps import ClipMaps, clip_maps
from pipelines.augment.params import ViewSpec
from pipelines.dali.frame_views import FrameViews, clip_frames
from pipelines.dataset.manifest import ManifestRow
from pipelines.dataset.video_list import probe_row
from pipelines.errors import DataError, VideoError
from pipelines.formatting import printable
from pipelines.sampling.temporal import view_indices
from pipelines.worker_pool import usable_cores
from trainer.checkpoint.weights import SavedWeights
from trainer.errors import RunError
from trainer.inference.prediction import check_scores, output_names
from trainer.inference.preprocessing import read_preprocessing
from trainer.inspection.contact_sheet import denormalise
from trainer.inspection.heat_map import upsample


@dataclass(frozen=True)
class HeatMap:
    """A map over the frames of a clip.

    about: name of the map.
    values: (T, H, W), scaled to a maximum of 1.
    peak: the maximum divided by the mean; a map with a peak near 1 carries no information. 0 for a map that
        is 0 everywhere.
    on_shown: share of a block's attention that is on patches, the rest being on the frames' class tokens;
        None for class activation.
    """

    about: str
    values: NDArray[np.float32]
    peak: float
    on_shown: float | None = None

    @property
    def strength(self) -> str:
        """The peak in words."""
        if self.peak == 0:
            return "0 everywhere; no region contributes"
        return f"highest value {self.peak:.1f} times the mean"


@dataclass(frozen=True)
class Explanation:
    """The explanation of one class for one clip of a video.

    path: the video.
    name, probability: of the class.
    frames: the model's input, uint8 RGB (T, H, W, 3).
    seconds: time of each frame in the video.
    maps: class activation, then the attention of each global block.
    """

    path: Path
    name: str
    probability: float
    frames: NDArray[np.uint8]
    seconds: tuple[float, ...]
    maps: tuple[HeatMap, ...]


class Explainer:
    """Explains the predictions of one model; the clip is the one of `predict` with one view."""

    def __init__(self, weights: SavedWeights, device: torch.device) -> None:
        """Raises RunError if the weights need a preprocessing that this version lacks."""
        config = weights.model.config
        self._model = weights.model.to(device).eval()
        self._names = output_names(weights.class_names, config.num_classes)
        self._device = device
        self._preprocessing = read_preprocessing(weights.preprocessing, config.frames, config.resolution)
        short_side = self._preprocessing.max_short_side
        self._clip = ViewSpec(config.frames, config.resolution, max_short_side=short_side)
        colours = self._preprocessing.mean, self._preprocessing.std
        self._views = FrameViews(self._clip, *colours, device, batch=1, threads=usable_cores())

    def explain(self, path: Path, name: str | None = None) -> Explanation:
        """Explain a class in a video, by default the most likely one.

        Raises RunError for an unknown class and for nonfinite scores, DataError for an unusable video.
        """
        label = None if name is None else self._label(name)
        try:
            row = probe_row(path)
            frames = clip_frames(path, row, self._clip)
        except VideoError as defect:
            raise DataError(f"{printable(path)} {defect}") from defect
        views = self._views([frames])[:, 0]  # 1 3 T H W
        maps = clip_maps(
            self._model, views, None if label is None else torch.tensor([label], device=self._device)
        )
        scores, label = maps.logits.softmax(dim=-1)[0], int(maps.labels[0])
        check_scores(scores)
        return Explanation(
            path,
            self._names[label],
            float(scores[label]),
            denormalise(views[0], self._preprocessing.mean, self._preprocessing.std).numpy(),
            _seconds(row, self._clip.frames),
            self._heat_maps(maps),
        )

    def _label(self, name: str) -> int:
        if name in self._names:
            return self._names.index(name)
        near = [known for known in self._names if name.lower() in known.lower()][:5]
        near = near or difflib.get_close_matches(name, self._names, n=5)
        hint = f"; similar names: {', '.join(map(repr, near))}" if near else ""
        raise RunError(
            f"--class {name!r}: the model has {len(self._names)} classes and none of this name{hint}"
        )

    def _heat_maps(self, found: ClipMaps) -> tuple[HeatMap, ...]:
        config = self._model.config
        size = (config.frames, config.resolution)
        activation = found.activation[0]
        maps = [HeatMap("class activation", upsample(activation, *size), _peak(activation))]
        if found.attention is not None:
            for number, layer in enumerate(config.global_layers):
                patches = found.attention.patches[0, number]
                about = f"attention of the global block after block {layer + 1}"
                maps.append(HeatMap(about, upsample(patches, *size), _peak(patches), float(patches.sum())))
        return tuple(maps)


def _seconds(row: ManifestRow, frames: int) -> tuple[float, ...]:
    """Times of the frames of the one view; their indices if the video has no frame rate."""
    numbers = view_indices(row.frames, frames, 1).reshape(-1).tolist()
    return tuple(number / row.fps if row.fps else float(number) for number in numbers)


def _peak(maps: Tensor) -> float:
    mean = float(maps.mean())
    return float(maps.max()) / mean if mean > 0 else 0.0
