"""The picture of a few validation videos."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.dataset.concat import Dataset
from tests.conftest import MotionSet
from trainer.errors import RunError
from trainer.evaluation.example_sheet import choose_examples, write_examples
from trainer.evaluation.scores import ScoreMetadata, schema

METADATA = ScoreMetadata("val.arrow", "0", ("a",) * 8, clips=1, crops=1, step=1, source="a run")


def write_scores(
    path: Path, labels: list[int], predictions: list[int | None], confidence: list[float]
) -> None:
    """In two row groups; a video without a prediction is bad."""
    scores = []
    for prediction, highest in zip(predictions, confidence, strict=True):
        row = np.full(8, (1 - highest) / 7, np.float32)
        if prediction is not None:
            row[prediction] = highest
        scores.append([None] * 8 if prediction is None else row.tolist())
    count = len(labels)
    columns = {
        "row": list(range(count)),
        "path": ["a"] * count,
        "label": labels,
        "prediction": predictions,
        "correct_top5": [None if prediction is None else True for prediction in predictions],
        "scores": scores,
    }
    table = pa.table(columns, schema=schema(8, METADATA))
    pq.write_table(table, path, row_group_size=max(1, count // 2))


def test_the_most_confident_errors_and_the_least_confident_right_answers(tmp_path: Path) -> None:
    scores = tmp_path / "scores.parquet"
    write_scores(scores, [0, 1, 2, 3, 4, 5], [1, 1, None, 0, 4, 0], [0.6, 0.9, 0.5, 0.8, 0.3, 0.4])
    chosen = choose_examples(scores)
    assert [(one.row, one.label, one.prediction) for one in chosen] == [
        (3, 3, 0), (0, 0, 1), (5, 5, 0), (4, 4, 4), (1, 1, 1),
    ]  # fmt: skip
    assert [round(one.confidence, 3) for one in chosen] == [0.8, 0.6, 0.4, 0.3, 0.9]


def test_the_sheet_shows_videos(tmp_path: Path, motion_set: MotionSet) -> None:
    videos = Dataset.open([motion_set.val])
    labels = [videos.row(k).label for k in range(len(videos))]
    scores, sheet = tmp_path / "scores.parquet", tmp_path / "examples.png"
    write_scores(scores, labels, [0] * len(labels), [0.5] * len(labels))
    write_examples(sheet, scores, videos)
    with Image.open(sheet) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[1] > 800 and pixels.std() > 20


def test_damaged_scores_are_a_mistake_in_words(tmp_path: Path, motion_set: MotionSet) -> None:
    scores = tmp_path / "scores.parquet"
    write_scores(scores, [0, 1], [1, 1], [0.6, 0.9])
    scores.write_bytes(scores.read_bytes()[:-9])
    with pytest.raises(RunError, match="scores"):
        write_examples(tmp_path / "examples.png", scores, Dataset.open([motion_set.val]))
