"""The picture of a confusion matrix, whatever the classes are called."""

import warnings
from pathlib import Path

import torch
from PIL import Image

from trainer.confusion import LABELLED, draw_confusion

NAMES = (
    "$$",
    "cost $5 and $6",
    r"$\frac{1}$",
    "$^_$",
    "a_b^c",
    "%d {x}",
    "跳舞",
    "two\nlines",
    "\x1b[31m",
    "",
)


def test_names_are_no_formulas(tmp_path: Path) -> None:
    path = tmp_path / "confusion.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_confusion(path, torch.eye(len(NAMES), dtype=torch.int64), NAMES, "step 3, top-1 100.0 %")
    with Image.open(path) as picture:
        assert min(picture.size) > 500


def test_many_classes_stay_one_picture(tmp_path: Path) -> None:
    path = tmp_path / "confusion.png"
    count = 10 * LABELLED
    draw_confusion(path, torch.ones(count, count, dtype=torch.int64), [f"$ {n}" for n in range(count)], "x")
    with Image.open(path) as picture:
        assert max(picture.size) < 2500
