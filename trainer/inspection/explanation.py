"""What a model looks at in a video: class activation and the attention of its global blocks."""

import difflib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.attention_maps import class_activation, global_attention
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
from trainer.inference.prediction import check_scores
from trainer.inference.preprocessing import read_preprocessing
from trainer.inspection.heat_map import upsample


@dataclass(frozen=True)
class HeatMap:
    """Over a clip. about: what it shows. values: (T, H, W), scaled to a maximum of 1. peak: the maximum as a
    multiple of the mean: near 1, the map says nothing. on_shown: the share of a block's attention that lies
    on patches; the rest lies on the frames' class tokens. None for class activation.
    """

    about: str
    values: NDArray[np.float32]
    peak: float
    on_shown: float | None = None


@dataclass(frozen=True)
class Explanation:
    """Of one clip of a video and one class.

    name, probability: of the class. frames: as the model sees them, uint8 RGB (T, H, W, 3). seconds: where
    in the video each of them is. maps: class activation first, then each global block's attention.
    """

    path: Path
    name: str
    probability: float
    frames: NDArray[np.uint8]
    seconds: tuple[float, ...]
    maps: tuple[HeatMap, ...]


class Explainer:
    """Makes explanations with one model; the clip is the one that `predict` takes with one view."""

    def __init__(self, weights: SavedWeights, device: torch.device) -> None:
        """Raises RunError where the weights' description is not one that can be followed here."""
        config = weights.model.config
        self._model = weights.model.to(device).eval()
        self._names = weights.class_names
        self._device = device
        self._preprocessing = read_preprocessing(weights.preprocessing, config.frames, config.resolution)
        self._clip = ViewSpec(config.frames, config.resolution, 1, 1)
        colours = self._preprocessing.mean, self._preprocessing.std
        self._views = FrameViews(self._clip, *colours, device, batch=1, threads=usable_cores())

    def explain(self, path: Path, name: str | None = None) -> Explanation:
        """What speaks for a class in a video; for the most likely one by default.

        Raises RunError for a class that the model does not have and for scores that are no numbers, DataError
        for a video that cannot be used.
        """
        label = None if name is None else self._label(name)
        try:
            row = probe_row(path)
            frames = clip_frames(path, row, self._clip)
        except VideoError as defect:
            raise DataError(f"{printable(path)} {defect}") from defect
        views = self._views([frames])[:, 0]  # 1 3 T H W
        with torch.no_grad():
            scores = self._model(views).softmax(dim=-1)[0]
        check_scores(scores)
        if label is None:
            label = int(scores.argmax())
        return Explanation(
            path,
            self._names[label] if label < len(self._names) else f"output {label}",
            float(scores[label]),
            self._visible(views[0]),
            _seconds(row, self._clip.frames),
            self._maps(views, label),
        )

    def _label(self, name: str) -> int:
        if name in self._names:
            return self._names.index(name)
        near = [known for known in self._names if name.lower() in known.lower()][:5]
        near = near or difflib.get_close_matches(name, self._names, n=5)
        hint = f"; near it are {', '.join(map(repr, near))}" if near else ""
        raise RunError(f"--class {name!r}: the model has no such class among its {len(self._names)}{hint}")

    def _maps(self, views: Tensor, label: int) -> tuple[HeatMap, ...]:
        config = self._model.config
        size = (config.frames, config.resolution)
        activation = class_activation(self._model, views, torch.tensor([label], device=self._device))[0]
        maps = [HeatMap("class activation", upsample(activation, *size), _peak(activation))]
        if self._model.fusion is not None:
            attention = global_attention(self._model, views)
            for number, layer in enumerate(config.global_layers):
                patches = attention.patches[0, number]
                about = f"attention of the global block after block {layer + 1}"
                maps.append(HeatMap(about, upsample(patches, *size), _peak(patches), float(patches.sum())))
        return tuple(maps)

    def _visible(self, views: Tensor) -> NDArray[np.uint8]:  # 3 T H W -> T H W 3
        mean, std = (
            torch.tensor(values, device=views.device)
            for values in (self._preprocessing.mean, self._preprocessing.std)
        )
        levels = (views.permute(1, 2, 3, 0) * std + mean) * 255
        pictures: NDArray[np.uint8] = levels.round().clamp(0, 255).to(torch.uint8).cpu().numpy()
        return pictures


def _seconds(row: ManifestRow, frames: int) -> tuple[float, ...]:
    """Where in the video the frames of its one view are; of a video without a rate, their numbers."""
    numbers = view_indices(row.frames, frames, 1).reshape(-1).tolist()
    return tuple(number / row.fps if row.fps else float(number) for number in numbers)


def _peak(maps: Tensor) -> float:
    mean = float(maps.mean())
    return float(maps.max()) / mean if mean > 0 else 0.0
