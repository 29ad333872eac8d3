"""The confusion matrix as a picture."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from pipelines.paths import printable

LABELLED = 40  # classes whose names still fit beside the axes
NUMBERED = 20  # classes whose shares still fit into the cells


def draw_confusion(path: Path, confusion: torch.Tensor, class_names: Sequence[str], title: str) -> None:
    """Write a PNG: row the true class, column the predicted one, colour the share of the row.

    confusion: (K, K) counts. A class without a video has an empty row.
    """
    import matplotlib  # late: only rank 0 draws

    # A name is no formula, whatever signs it holds, and one without glyphs in the font is no news.
    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from")
        _draw(path, confusion, [printable(name) for name in class_names], title)


def _draw(path: Path, confusion: torch.Tensor, class_names: Sequence[str], title: str) -> None:
    from matplotlib.figure import Figure

    counts = confusion.double()
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    classes = len(class_names)
    side = min(16.0, max(5.0, 0.45 * classes + 3))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    if classes <= LABELLED:
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
