"""Predictions from Python: `trainer.load(FILE).predict(PATH)`.

A video's scores equal those of the run's evaluation with the same views up to float32 rounding: the same code
chooses and decodes the frames, and the same DALI graph makes the views.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.cost import clips_per_forward
from pipelines.augment.params import ViewSpec
from pipelines.autotune import LoaderOptions
from pipelines.dali.frame_views import FrameViews, clip_frames
from pipelines.dataset.video_list import VideoFiles, probe_row
from pipelines.errors import DataError, VideoError
from pipelines.formatting import printable
from pipelines.loader import ClipLoader, view_loader
from pipelines.sampling.sampler import ViewSampler
from pipelines.worker_pool import Progress, usable_cores
from trainer.checkpoint.weights import SavedWeights
from trainer.errors import RunError
from trainer.inference.model_source import open_model
from trainer.inference.prediction import (
    Prediction,
    Timeline,
    WindowPrediction,
    check_scores,
    output_names,
    top_of,
)
from trainer.inference.preprocessing import read_preprocessing
from trainer.inference.sliding_windows import scored_windows
from trainer.inference.view_scores import view_scores, views_at_once
from trainer.system.host import SharedMemory

AUTO = "auto"
ENOUGH_SHARED_MEMORY = 2**33  # bytes: twice the largest prefetch of a loader for videos of usual size
_MOST_VIEWS = 64  # per batch
_MOST_VIDEOS = 8  # per batch
_MOST_WORKERS = 1024


class Predictor:
    """A trained model on a device.

    class_names: one name per output.
    preprocessing: of the clips, from the weights' metadata.
    """

    def __init__(self, weights: SavedWeights, device: torch.device) -> None:
        """Raises RunError if the weights need a preprocessing that this version lacks."""
        config = weights.model.config
        self.preprocessing = read_preprocessing(weights.preprocessing, config.frames, config.resolution)
        self.class_names = output_names(weights.class_names, config.num_classes)
        self.device = device
        self._model = weights.model.to(device).eval()
        self._views_at_once = views_at_once(config, device, "fp32")
        self._views_per_batch = min(_MOST_VIEWS, clips_per_forward(config, on_cpu=False))
        self._frame_views: FrameViews | None = None

    @overload
    def predict(self, videos: str | Path, *, top: int = 5, clips: int = 1, crops: int = 1) -> Prediction: ...
    @overload
    def predict(
        self, videos: list[str] | list[Path], *, top: int = 5, clips: int = 1, crops: int = 1
    ) -> list[Prediction]: ...
    def predict(
        self,
        videos: str | Path | list[str] | list[Path],
        *,
        top: int = 5,
        clips: int = 1,
        crops: int = 1,
    ) -> Prediction | list[Prediction]:
        """Predict one video, or each of several.

        top: number of classes to return. clips, crops: views per video, whose probabilities are averaged.

        Raises DataError if a single video is unusable; in a list its prediction has `error`.
        """
        if not isinstance(videos, str | Path):
            return list(self.stream([Path(path) for path in videos], top=top, clips=clips, crops=crops))
        (found,) = self.stream([Path(videos)], top=top, clips=clips, crops=crops)
        if found.error:
            raise DataError(f"{printable(found.path)} {found.error}")
        return found

    def stream(
        self, paths: Sequence[Path], *, top: int = 5, clips: int = 1, crops: int = 1, workers: int | None = 0
    ) -> Iterator[Prediction]:
        """Yield predictions in the order of the files; memory does not grow with their number.

        workers: processes that read and decode; 0 uses this process, None chooses the number. With workers
        the caller's main module must be importable (`if __name__ == "__main__":`).

        Raises RunError for an invalid number of views or workers, or if /dev/shm is too small for the
        workers.
        """
        clip = self._clip(clips, crops)
        _check_top(top)
        if workers is not None and not 0 <= workers <= _MOST_WORKERS:
            raise RunError(f"{workers} workers; allowed are 0 to {_MOST_WORKERS}")
        scored = self._in_process(paths, clip) if workers == 0 else self._with_workers(paths, clip, workers)
        for path, scores in scored:
            if isinstance(scores, str):
                yield Prediction(path, error=scores)
            else:
                yield Prediction(path, top_of(scores, self.class_names, top), scores)

    def timeline(
        self,
        path: Path,
        *,
        window: float,
        stride: float | None = None,
        top: int = 5,
        clips: int = 1,
        crops: int = 1,
        progress: Progress = lambda done, total: None,
    ) -> Timeline:
        """Predict sliding windows of a long video, which is decoded once from beginning to end.

        window: length in seconds. stride: seconds between the starts of two windows; by default the length.
        progress: called with the number of finished windows and their total.

        Raises RunError for invalid windows. For an unusable video, `error` has the reason.
        """
        clip = self._clip(clips, crops)
        _check_top(top)
        scored = scored_windows(
            path,
            clip,
            self.preprocessing,
            self._scores,
            self.device,
            length=window,
            stride=window if stride is None else stride,
            batch=self._batch(clip),
        )
        found: list[WindowPrediction] = []
        error = ""
        try:
            for each, scores, total in scored:
                named = top_of(scores, self.class_names, top)
                found.append(WindowPrediction(each.start, each.end, named))
                progress(len(found), total)
        except VideoError as defect:
            error = str(defect)
        return Timeline(path, tuple(found), error)

    def _clip(self, clips: int, crops: int) -> ViewSpec:
        if not 1 <= clips <= 1000:
            raise RunError(f"{clips} clips per video; allowed are 1 to 1,000")
        if crops not in (1, 3):
            raise RunError(f"{crops} crops per clip; allowed are 1, the centre, or 3, along the longer side")
        made = self.preprocessing
        return ViewSpec(made.frames, made.resolution, clips, crops, made.max_short_side)

    def _batch(self, clip: ViewSpec) -> int:
        return max(1, min(_MOST_VIDEOS, self._views_per_batch // clip.views))

    def _in_process(
        self, paths: Sequence[Path], clip: ViewSpec
    ) -> Iterator[tuple[Path, NDArray[np.float32] | str]]:
        if self._frame_views is None or self._frame_views.clip != clip:
            colours = self.preprocessing.mean, self.preprocessing.std
            self._frame_views = FrameViews(clip, *colours, self.device, batch=1, threads=usable_cores())
        for path in paths:
            try:
                frames = clip_frames(path, probe_row(path), clip)
            except VideoError as defect:
                yield path, str(defect)
                continue
            yield path, self._scores(self._frame_views([frames]))[0]

    def _with_workers(
        self, paths: Sequence[Path], clip: ViewSpec, workers: int | None
    ) -> Iterator[tuple[Path, NDArray[np.float32] | str]]:
        sampler = ViewSampler(len(paths), self._batch(clip), world_size=1)
        options = LoaderOptions(self.device, workers=workers, cores=usable_cores())
        colours = self.preprocessing
        with (
            VideoFiles(paths) as files,
            closing(
                view_loader(files, sampler, clip, mean=colours.mean, std=colours.std, rank=0, options=options)
            ) as loader,
        ):
            _check_shared_memory(loader)
            for batch in loader:
                samples = [sample for sample in batch.ids.tolist() if sample >= 0]  # empty slots come last
                scores = self._scores(batch.clips[: len(samples)])
                for place, sample in enumerate(samples):
                    if bool(batch.valid[place]):
                        yield paths[sample], scores[place]
                    else:
                        yield paths[sample], loader.bad_samples.videos[sample].reason
                loader.bad_samples.pop_new()

    def _scores(self, views: Tensor) -> NDArray[np.float32]:  # B V 3 T H W -> B K
        """Mean softmax of each video's views. Raises RunError like `view_scores` and `check_scores`."""
        exact: AbstractContextManager[None] = nullcontext()
        if self.device.type == "cuda":  # TF32 would round a convolution's inputs to 10 bits
            exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.inference_mode(), exact:
            scores = view_scores(
                self._model,
                views,
                self._views_at_once,
                reduce_by="Use fewer clips or crops, or the device cpu",
            )
        check_scores(scores)
        return scores.cpu().numpy()


def load(
    source: str | Path,
    device: str = AUTO,
    *,
    last: bool = False,
    frames: int | None = None,
    class_names: Sequence[str] | None = None,
) -> Predictor:
    """Load a trained model.

    source, last, frames, class_names: as for `open_model`. device: `auto` (a GPU if there is one), `cpu`,
    `cuda` or `cuda:1`.

    Raises RunError if the model cannot be read or the device does not exist.
    """
    chosen = choose_device(device)
    names = None if class_names is None else tuple(class_names)
    return Predictor(open_model(Path(source), last=last, frames=frames, class_names=names), chosen)


def _check_top(count: int) -> None:
    if count < 1:
        raise RunError(f"top {count} classes: the number must be at least 1")


def choose_device(name: str) -> torch.device:
    """The named device; `auto` is a GPU if there is one. Raises RunError if it does not exist."""
    if name == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise RunError(f"unknown device {name!r}; allowed are auto, cpu, cuda and cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RunError(f"device {name} does not exist: torch sees {torch.cuda.device_count()} GPUs; use cpu")
    return device


def _check_shared_memory(loader: ClipLoader) -> None:
    memory = SharedMemory.read()
    if memory is None or memory.free >= ENOUGH_SHARED_MEMORY:
        return
    need = loader.shared_memory().most
    if need > memory.free:
        raise RunError(
            f"/dev/shm has {memory.free / 2**20:,.0f} MiB free, and the workers need {need / 2**20:,.0f} "
            "MiB; start the container with a larger one (--shm-size=8g), or use no workers (--workers 0)"
        )
