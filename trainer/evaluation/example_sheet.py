"""A picture of a few validation videos with their true and predicted classes."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch

from pipelines.augment.params import ViewSpec
from pipelines.dali.frame_views import clip_frames
from pipelines.dataset.concat import Dataset
from pipelines.errors import VideoError
from trainer.errors import RunError
from trainer.evaluation.scores import row_groups, tensors_of
from trainer.inspection.contact_sheet import SheetRow, draw_sheet, save_sheet

EXAMPLES = "examples.png"
"""File name of the picture in the run directory and among its MLflow artifacts."""

_ERRORS = 6  # the most confident ones
_RIGHT = 3  # the least confident ones
_FRAMES = 4  # of each video


@dataclass(frozen=True)
class Example:
    """One video of an evaluation.

    confidence: highest score, 0..1.
    row: index in the manifest.
    label: true class.
    prediction: predicted class.
    """

    confidence: float
    row: int
    label: int
    prediction: int


def choose_examples(scores: Path) -> list[Example]:
    """The errors with the highest scores, then the correct predictions with the lowest.

    scores: file of `scores.ScoreFile`; one row group is in memory at a time.
    """
    errors: list[Example] = []
    right: list[Example] = []
    for table in row_groups(scores):
        values, labels, valid = tensors_of(table)
        numbers = torch.tensor(table.column("row").to_pylist())
        predictions = torch.tensor(table.column("prediction").fill_null(0).to_pylist())
        confidence = values.gather(1, predictions[:, None])[:, 0]
        counts = valid & (labels >= 0)
        for kept, wanted, most in (
            (errors, predictions != labels, _ERRORS),
            (right, predictions == labels, _RIGHT),
        ):
            places = (counts & wanted).nonzero()[:, 0]
            order = confidence[places].argsort(descending=kept is errors, stable=True)[:most]
            kept += [
                Example(float(confidence[k]), int(numbers[k]), int(labels[k]), int(predictions[k]))
                for k in places[order].tolist()
            ]
            kept.sort(key=lambda example: example.confidence, reverse=kept is errors)
            del kept[most:]
    return [*errors, *right]


def write_examples(path: Path, scores: Path, videos: Dataset) -> None:
    """Write the sheet as a PNG, atomically. An unreadable video has its reason in place of frames.

    Raises RunError if the sheet cannot be written or the scores cannot be read.
    """
    names = videos.class_names
    rows = []
    try:
        chosen = choose_examples(scores)
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"{scores} cannot be read: {error}") from error
    for example in chosen:
        known = example.prediction < len(names)  # a head may have more outputs than the data has classes
        predicted = names[example.prediction] if known else f"class {example.prediction}"
        words = [
            f"{'right' if example.prediction == example.label else 'wrong'}: {predicted}",
            f"score {example.confidence:.3f}",
            f"true class: {names[example.label]}",
        ]
        try:
            row = videos.row(example.row)
            frames = list(clip_frames(videos.path(example.row), row, ViewSpec(_FRAMES, size=1)))
        except VideoError as defect:
            words.append(str(defect))
            frames = []
        rows.append(SheetRow([*words, videos.printable_path(example.row)], frames))
    title = "validation videos: errors with the highest scores, correct ones with the lowest"
    columns = [f"{k + 1} of {_FRAMES}" for k in range(_FRAMES)]
    save_sheet(path, draw_sheet(title, rows, columns), option=None)
