"""Predictions of many videos, printed as they come, with progress: the work of `launch/predict.py`."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from models.weights.safetensors_header import shorten
from pipelines.annotated_video import Lines, annotate_video, printable_text
from pipelines.dataset.paths import check_writable
from pipelines.decode.frame_stream import FrameStream
from pipelines.errors import DataError, VideoError
from pipelines.formatting import printable
from trainer.errors import RunError
from trainer.inference.prediction import Prediction, Timeline
from trainer.inference.prediction_output import PredictionWriter
from trainer.inference.predictor import Predictor
from trainer.monitoring.progress import show_progress

FEW = 16
"""Videos up to which starting worker processes takes longer than it saves."""

_LONGEST_NAME = 200  # bytes of a video's name that its annotated video takes over
_ADDED = "-predicted.mp4"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PredictOptions:
    """What is wanted of each video.

    top: classes to name. clips, crops: views. window, stride: seconds, for a timeline; None for one
    prediction of the whole. workers: processes that decode; None chooses. annotate: folder for annotated
    videos.
    """

    top: int = 5
    clips: int = 1
    crops: int = 1
    window: float | None = None
    stride: float | None = None
    workers: int | None = None
    annotate: Path | None = None


def predict_videos(
    predictor: Predictor, paths: Sequence[Path], options: PredictOptions, output: PredictionWriter
) -> int:
    """Print what the model says of each video, in their order. Returns how many could not be used.

    Raises RunError and DataError for what would fail for every video.
    """
    if options.stride is not None and options.window is None:
        raise RunError("--stride is the time from one window to the next; give their length with --window")
    if options.annotate is not None:
        _prepare_folder(options.annotate)
        _say_boxes(predictor.class_names)
    predictions = _whole if options.window is None else _timelines
    names = _Names(options.annotate or Path(), paths)
    bad = 0
    for each in predictions(predictor, paths, options):
        bad += bool(each.error)
        if isinstance(each, Timeline):
            output.write_timeline(each)
        else:
            output.write_prediction(each)
        if options.annotate is not None and (isinstance(each, Timeline) or not each.error):
            bad += not _annotate(each, names.of(each.path)) and not each.error
    return bad


def _whole(predictor: Predictor, paths: Sequence[Path], options: PredictOptions) -> Iterator[Prediction]:
    workers = 0 if options.workers is None and len(paths) <= FEW else options.workers
    found = predictor.stream(
        paths, top=options.top, clips=options.clips, crops=options.crops, workers=workers
    )
    if len(paths) == 1 or (sys.stdout.isatty() and sys.stderr.isatty()):
        yield from found  # what is printed shows how far it is
        return
    with show_progress("predicting", sys.stderr) as progress:
        for done, each in enumerate(found, start=1):
            yield each
            progress(done, len(paths))


def _timelines(predictor: Predictor, paths: Iterable[Path], options: PredictOptions) -> Iterator[Timeline]:
    assert options.window is not None
    for path in paths:
        with _progress(f"windows of {printable(path.name)}") as progress:
            found = predictor.timeline(
                path,
                window=options.window,
                stride=options.stride,
                top=options.top,
                clips=options.clips,
                crops=options.crops,
                progress=progress,
            )
        yield found


def _annotate(found: Prediction | Timeline, out: Path) -> bool:
    """Write the annotated video; False where the video turns out to be damaged, which is said."""

    def lines_at(seconds: float) -> Lines:
        top = found.top if isinstance(found, Prediction) else getattr(found.at(seconds), "top", ())
        return tuple((shorten(name), share) for name, share in top)

    try:
        with _progress(f"frames of {printable(out.name)}") as progress:
            annotate_video(FrameStream(found.path), out, lines_at, progress)
    except VideoError as defect:
        print(f"{printable(found.path)} {defect}: no annotated video of it", file=sys.stderr)
        return False
    print(f"wrote {printable(out)}", file=sys.stderr)
    return True


def _progress(work: str) -> AbstractContextManager[Progress]:
    return show_progress(work, sys.stderr)


def _prepare_folder(folder: Path) -> None:
    try:
        check_writable(folder)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{printable(folder)} cannot be written: {error.strerror}") from error


def _say_boxes(class_names: Sequence[str]) -> None:
    boxed = [name for name in class_names if printable_text(shorten(name)) != shorten(name)]
    if boxed:
        print(
            f"note: {len(boxed)} class names have characters that the font of annotated videos lacks, such "
            f"as '{shorten(boxed[0])}'; they are shown as boxes there",
            file=sys.stderr,
        )


class _Names:
    """Gives each video the name of its annotated one: no two the same, and none that of a video."""

    def __init__(self, folder: Path, videos: Sequence[Path]) -> None:
        self._folder = folder
        self._counts: dict[str, int] = {}
        self._taken = {path.absolute() for path in videos}

    def of(self, path: Path) -> Path:
        stem = path.stem.encode(errors="surrogateescape")[:_LONGEST_NAME].decode(errors="ignore")
        name = self._folder / f"{stem}{_ADDED}"
        while name.absolute() in self._taken:
            count = self._counts[stem] = self._counts.get(stem, 1) + 1
            name = self._folder / f"{stem}-{count}{_ADDED}"
        self._taken.add(name.absolute())
        return name
