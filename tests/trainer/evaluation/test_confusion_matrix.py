"""The picture of a confusion matrix, whatever the classes are called."""

import warnings
from pathlib import Path

import torch
from PIL import Image

from trainer.evaluation.confusion_matrix import LABELLED, class_table, draw_confusion

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


def test_many_classes_without_an_error_make_a_picture(tmp_path: Path) -> None:
    count = 2 * LABELLED
    draw_confusion(tmp_path / "a.png", torch.eye(count, dtype=torch.int64), [""] * count, "x")
    assert (tmp_path / "a.png").stat().st_size


def test_the_accuracy_of_each_class() -> None:
    # Of a, b, c: b is taken for c three times, a for b once; c has no video.
    confusion = torch.tensor([[4, 1, 0], [0, 1, 3], [0, 0, 0]])
    assert [row[0] for row in class_table(confusion, ["a"])["data"]] == ["class 1", "a", "class 2"]
    assert class_table(confusion, ["a", "b", "c\n"])["data"] == [
        ["b", 4, 0.25, 0.5, "c\\n", 3],
        ["a", 5, 0.8, 1.0, "b", 1],
        ["c\\n", 0, None, 0.0, "", 0],
    ]
