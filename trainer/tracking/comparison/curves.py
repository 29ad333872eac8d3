"""One picture of the training loss and accuracy of many runs, over steps, clips, hours and GPU-hours."""

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.formatting import printable
from trainer.tracking.comparison.differences import Group
from trainer.tracking.comparison.results import group_labels
from trainer.tracking.comparison.runs import ComparedRun, Curve

MOST_LINES = 20
_LONGEST_LABEL = 28  # characters
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Distinct with any common colour blindness (Okabe and Ito), without yellow, which is too light for a
line."""
_STYLES = ("-", "--", ":")
_SMOOTHING = 1 / 20  # of a curve's points, averaged into each
_MARKED = 40  # evaluations of a run up to which each has a marker
_GRID = 200  # points of a group's mean

_AXES = ("steps", "clips seen", "hours", "GPU-hours")


@dataclass(frozen=True)
class _Line:
    label: str
    members: tuple[ComparedRun, ...]


def draw_curves(runs: Sequence[ComparedRun], groups: Sequence[Group]) -> tuple[bytes, str] | None:
    """A PNG and its caption; None where no run has a curve.

    runs: by their best top-1. Of more than `MOST_LINES` runs, the means of their groups of seeds are drawn
    where these are at most so many, else the best runs.
    """
    lines, caption = _choose_lines(runs, groups)
    curves = {id(run): run.read_curve() for line in lines for run in line.members}
    if not any(curve is not None for curve in curves.values()):
        return None
    import matplotlib  # seconds, and only a picture needs it

    # A name with $ signs is not a formula; a character that the font lacks needs no warning.
    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from")
        return _draw(lines, curves), caption


def _choose_lines(runs: Sequence[ComparedRun], groups: Sequence[Group]) -> tuple[list[_Line], str]:
    what = "Training loss (mean of neighbouring points) and top-1 of the validation videos"
    single = [_Line(f"{number} {run.name}", (run,)) for number, run in enumerate(runs, start=1)]
    if len(runs) <= MOST_LINES:
        return single, f"{what}."
    alone = len(runs) - sum(map(len, groups))
    if groups and len(groups) + alone <= MOST_LINES:
        grouped = {index for group in groups for index in group}
        lines = [
            _Line(label, tuple(runs[index] for index in group))
            for label, group in zip(group_labels(runs, groups), groups, strict=True)
        ]
        lines += [line for index, line in enumerate(single) if index not in grouped]
        return lines, f"{what}; of each group of seeds the mean, and its range as a band."
    return single[:MOST_LINES], f"{what}, of the {MOST_LINES} runs with the highest top-1 of {len(runs)}."


def _draw(lines: Sequence[_Line], curves: dict[int, Curve | None]) -> bytes:
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator

    figure = Figure(figsize=(16, 7.5), layout="constrained")
    axes = figure.subplots(2, len(_AXES), sharex="col", sharey="row")
    losses: list[np.ndarray] = []
    for number, line in reversed(list(enumerate(lines))):  # the best is drawn last, on top
        colour = _COLOURS[number % len(_COLOURS)]
        style = {"color": colour, "linestyle": _STYLES[number // len(_COLOURS) % len(_STYLES)]}
        label = printable(line.label)
        style["label"] = label if len(label) <= _LONGEST_LABEL else f"{label[: _LONGEST_LABEL - 1]}…"
        for column in range(len(_AXES)):
            pairs = [(run, curves[id(run)]) for run in line.members]
            loss = [_loss(run, curve, column) for run, curve in pairs if curve is not None]
            accuracy = [_accuracy(run, curve, column) for run, curve in pairs]
            _plot(axes[0, column], [xy for xy in loss if xy is not None], style)
            _plot(axes[1, column], [xy for xy in accuracy if xy is not None], style, marks=True)
            losses += [xy[1] for xy in loss if xy is not None and column == 0]
    for column, name in enumerate(_AXES):
        axes[1, column].set_xlabel(name)
        for row in (0, 1):
            axes[row, column].grid(alpha=0.3)
            axes[row, column].set_xlim(left=0)
            axes[row, column].xaxis.set_major_locator(MaxNLocator(5))
            if column < 2:
                axes[row, column].xaxis.set_major_formatter(EngFormatter(sep=""))
            axes[row, column].spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("training loss")
    axes[1, 0].set_ylabel("top-1, %")
    if losses:
        # Without a limit, a diverging run would flatten all others.
        together = np.concatenate(losses)
        low, high = np.nanpercentile(together, [0, 99.5])
        if 0 < 3 * low < high:  # differences at the end are small beside those of the beginning
            axes[0, 0].set_yscale("log")
            margin = (high / low) ** 0.05
            axes[0, 0].set_ylim(low / margin, high * margin)
            axes[0, 0].yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
            for set_formatter in (axes[0, 0].yaxis.set_major_formatter, axes[0, 0].yaxis.set_minor_formatter):
                set_formatter(lambda value, _: f"{value:g}")
        else:
            margin = 0.05 * (high - low) or 0.1
            axes[0, 0].set_ylim(low - margin, high + margin)
    # A run may have losses without an evaluation, or evaluations without losses.
    found: dict[str, Any] = {}
    for row in (0, 1):
        handles, labels = axes[row, 0].get_legend_handles_labels()
        found = {**dict(zip(labels, handles, strict=True)), **found}
    found = dict(reversed(found.items()))
    figure.legend(found.values(), found.keys(), loc="outside right center", fontsize=9, frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    return picture.getvalue()


def _plot(
    axes: Any, found: list[tuple[np.ndarray, np.ndarray]], style: dict[str, str], marks: bool = False
) -> None:
    found = [(x, y) for x, y in found if np.isfinite(x).any() and np.isfinite(y).any()]
    if not found:
        return
    if len(found) == 1:
        (x, y) = found[0]
        axes.plot(
            x, y, linewidth=1.4, marker="o" if marks and len(x) <= _MARKED else None, markersize=2.5, **style
        )
        return
    start, end = max(x[0] for x, _ in found), min(x[-1] for x, _ in found)
    if end <= start:
        return
    grid = np.linspace(start, end, _GRID)
    every = np.array([np.interp(grid, x, y) for x, y in found])
    axes.plot(grid, every.mean(axis=0), linewidth=1.4, **style)
    axes.fill_between(
        grid, every.min(axis=0), every.max(axis=0), color=style["color"], alpha=0.15, linewidth=0
    )


def _loss(run: ComparedRun, curve: Curve, column: int) -> tuple[np.ndarray, np.ndarray] | None:
    x = _effort(run, curve, column)
    if x is None:
        return None
    kept = np.isfinite(x) & np.isfinite(curve.loss)
    return (x[kept], smoothed(curve.loss[kept])) if kept.any() else None


def smoothed(values: np.ndarray) -> np.ndarray:
    """(N,): the mean over a window around each point, shorter at the ends."""
    window = np.ones(2 * int(len(values) * _SMOOTHING / 2) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _accuracy(run: ComparedRun, curve: Curve | None, column: int) -> tuple[np.ndarray, np.ndarray] | None:
    steps = np.array([found.step for found in run.evaluations], float)
    top1 = 100 * np.array([found.top1 for found in run.evaluations], float)
    if column == 0 and steps.size:
        return steps, top1
    if curve is None or not steps.size:
        return None
    x = _effort(run, curve, column)
    if x is None:
        return None
    kept = np.isfinite(x)
    if not kept.any():
        return None
    # Interpolated from the origin on; after the last recorded step, in proportion to the steps.
    known, effort = np.append(0.0, curve.steps[kept]), np.append(0.0, x[kept])
    at_steps = np.interp(steps, known, effort)
    beyond = steps > known[-1]
    at_steps[beyond] = effort[-1] * steps[beyond] / known[-1]
    return at_steps, top1


def _effort(run: ComparedRun, curve: Curve, column: int) -> np.ndarray | None:
    batch = run.global_batch
    clips = None if batch is None else curve.steps * batch
    return (curve.steps, clips, curve.hours, curve.gpu_hours)[column]
