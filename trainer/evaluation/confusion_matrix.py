"""The confusion matrix of an evaluation as a picture, and the accuracy of each class as a table."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pipelines.formatting import printable
from trainer.evaluation.metrics import most_confused, per_class

LABELLED = 40  # most classes that are drawn as a matrix
NUMBERED = 20  # most classes with numbers in the cells
PAIRS = 30  # most confused pairs that are drawn for more classes
_LONGEST = 40  # characters of a class's name beside the pairs

CLASS_TABLE = "per_class.json"
"""The table's file name in the run directory and among the MLflow artifacts."""


def draw_confusion(path: Path, confusion: Tensor, class_names: Sequence[str], title: str) -> None:
    """Write a PNG: for up to 40 classes the matrix of shares, with true classes as rows and predicted classes
    as columns; for more the most frequent errors. Raises OSError.

    confusion: (K, K) counts. A class without videos has an empty row.
    """
    import matplotlib  # late: only rank 0 draws

    # Class names are no formulas, and may lack glyphs in the font.
    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from")
        names = _names_of_all(class_names, len(confusion))
        if len(names) <= LABELLED:
            _draw_matrix(path, confusion, names, title)
        else:
            _draw_pairs(path, confusion, names, title)


def class_table(confusion: Tensor, class_names: Sequence[str]) -> dict[str, Any]:
    """The accuracy of each class as a table in MLflow's form, the least accurate class first.

    recall: share of the class's videos that are predicted as the class. precision: share of the videos
    predicted as the class that are of it. Both are null without such videos. taken_for: the most frequent
    wrong class, and `times` its count.
    """
    names = _names_of_all(class_names, len(confusion))
    wrong_counts, wrong = confusion.clone().fill_diagonal_(0).max(dim=1)
    rows = [
        [
            names[one.label],
            one.videos,
            round(one.accuracy, 4) if one.videos else None,
            round(one.correct / one.predicted, 4) if one.predicted else None,
            names[int(wrong[one.label])] if wrong_counts[one.label] else "",
            int(wrong_counts[one.label]),
        ]
        for one in per_class(confusion)
    ]
    rows.sort(key=lambda row: 2.0 if row[2] is None else row[2])
    return {"columns": ["class", "videos", "recall", "precision", "taken_for", "times"], "data": rows}


def _names_of_all(class_names: Sequence[str], classes: int) -> list[str]:
    """Names of all classes; those without a name by their number."""
    others = (f"class {k}" for k in range(len(class_names), classes))
    return [*map(printable, class_names), *others]


def _draw_pairs(path: Path, confusion: Tensor, class_names: Sequence[str], title: str) -> None:
    from matplotlib.figure import Figure

    pairs = most_confused(confusion, PAIRS)
    totals = confusion.sum(dim=1).tolist()
    figure = Figure(figsize=(10, max(3.0, 0.3 * len(pairs) + 1.5)), layout="constrained")
    axes = figure.add_subplot()
    shares = [100 * pair.share for pair in pairs]
    bars = axes.barh(range(len(pairs)), shares, color="#3b75af")
    axes.bar_label(bars, [f"{pair.videos} of {totals[pair.true]}" for pair in pairs], padding=3, fontsize=8)
    short = [name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…" for name in class_names]
    names = [f"{short[pair.true]}  predicted as  {short[pair.predicted]}" for pair in pairs]
    axes.set_yticks(range(len(pairs)), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="% of the true class's videos", title=f"most frequent errors, {title}")
    figure.savefig(path, dpi=110)


def _draw_matrix(path: Path, confusion: Tensor, class_names: Sequence[str], title: str) -> None:
    from matplotlib.figure import Figure

    counts = confusion.double()
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    classes = len(class_names)
    side = min(16.0, max(5.0, 0.45 * classes + 3))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    axes.set_xticks(range(classes), class_names, rotation=45, ha="right")
    axes.set_yticks(range(classes), class_names)
    if classes <= NUMBERED:
        for row in range(classes):
            for column in range(classes):
                if shares[row, column] > 0:
                    colour = "white" if shares[row, column] > 0.5 else "black"
                    text = f"{100 * shares[row, column]:.0f}"
                    axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    figure.savefig(path, dpi=110)
