"""Predicts many videos and prints each prediction at once, with progress; for `launch/predict.py`."""

import sys
from collections.abc import Iterable, Iterator, Sequence
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
"""Number of videos up to which worker processes cost more time than they save."""

_LONGEST_NAME = 200  # bytes of a video's name in the name of its annotated video
_ADDED = "-predicted.mp4"


@dataclass(frozen=True)
class PredictOptions:
    """Options for each video.

    top: number of classes to print.
    clips, crops: views per video.
    window, stride: seconds, for a timeline; None for one prediction of the whole video.
    workers: processes that decode; None chooses.
    annotate: folder for annotated videos.
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
    """Print the prediction of each video, in order. Returns the number of unusable videos.

    Raises RunError and DataError for errors that concern all videos.
    """
    if options.stride is not None and options.window is None:
        raise RunError("--stride is the time between two windows; give the length of a window with --window")
    if options.annotate is not None:
        _prepare_folder(options.annotate)
        _warn_of_missing_glyphs(predictor.class_names)
    predictions = _whole if options.window is None else _timelines
    names = _Names(options.annotate or Path(), paths)
    bad = 0
    for each in predictions(predictor, paths, options):
        bad += bool(each.error)
        output.write(each)
        if options.annotate is not None and (isinstance(each, Timeline) or not each.error):
            bad += not _annotate(each, names.of(each.path)) and not each.error
    return bad


def _whole(predictor: Predictor, paths: Sequence[Path], options: PredictOptions) -> Iterator[Prediction]:
    workers = 0 if options.workers is None and len(paths) <= FEW else options.workers
    found = predictor.stream(
        paths, top=options.top, clips=options.clips, crops=options.crops, workers=workers
    )
    if len(paths) == 1 or (sys.stdout.isatty() and sys.stderr.isatty()):
        yield from found  # the printed predictions show the progress
        return
    with show_progress("predicting", sys.stderr) as progress:
        for done, each in enumerate(found, start=1):
            yield each
            progress(done, len(paths))


def _timelines(predictor: Predictor, paths: Iterable[Path], options: PredictOptions) -> Iterator[Timeline]:
    assert options.window is not None
    for path in paths:
        with show_progress(f"windows of {printable(path.name)}", sys.stderr) as progress:
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
    """Write the annotated video; prints an error and returns False if the video is damaged."""

    def lines_at(seconds: float) -> Lines:
        top = found.top if isinstance(found, Prediction) else getattr(found.at(seconds), "top", ())
        return tuple((shorten(name), share) for name, share in top)

    try:
        with show_progress(f"frames of {printable(out.name)}", sys.stderr) as progress:
            annotate_video(FrameStream(found.path), out, lines_at, progress)
    except VideoError as defect:
        print(f"{printable(found.path)} {defect}: its annotated video was not written", file=sys.stderr)
        return False
    print(f"wrote {printable(out)}", file=sys.stderr)
    return True


def _prepare_folder(folder: Path) -> None:
    try:
        check_writable(folder)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{printable(folder)} cannot be written: {error.strerror}") from error


def _warn_of_missing_glyphs(class_names: Sequence[str]) -> None:
    boxed = [name for name in class_names if printable_text(shorten(name)) != shorten(name)]
    if boxed:
        print(
            f"note: the font of annotated videos lacks characters of {len(boxed)} class names, such as "
            f"'{shorten(boxed[0])}'; they are drawn as boxes",
            file=sys.stderr,
        )


class _Names:
    """Names of annotated videos: unique, and different from all input videos."""

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
