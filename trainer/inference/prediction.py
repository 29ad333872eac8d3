"""Predictions of a video and of the windows of a long video."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, zip_longest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from trainer.errors import RunError

Top = tuple[tuple[str, float], ...]
"""Classes with their probabilities, the most likely first."""


@dataclass(frozen=True)
class Prediction:
    """The prediction of one video.

    path: the video.
    top: the most likely classes.
    scores: (K,) probabilities of all classes, in the order of the model's outputs.
    error: why the video is unusable, as text that follows its name; then the other fields are empty.
    """

    path: Path
    top: Top = ()
    scores: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    error: str = ""


@dataclass(frozen=True, slots=True)
class WindowPrediction:
    """The prediction of one window. start, end: seconds from the first frame."""

    start: float
    end: float
    top: Top


@dataclass(frozen=True, slots=True)
class Segment:
    """A time span with one most likely class. probability: mean over its windows."""

    start: float
    end: float
    name: str
    probability: float


@dataclass(frozen=True)
class Timeline:
    """The windows of one video. error: why the rest of it is unusable; the windows before it are present."""

    path: Path
    windows: tuple[WindowPrediction, ...]
    error: str = ""

    @property
    def segments(self) -> list[Segment]:
        """Consecutive windows with the same most likely class, merged.

        Between two windows the class changes halfway between their centres.
        """
        segments: list[Segment] = []
        groups = [list(group) for _, group in groupby(self.windows, key=lambda window: window.top[0][0])]
        for group, following in zip_longest(groups, groups[1:]):
            start = segments[-1].end if segments else group[0].start
            end = group[-1].end if following is None else _boundary(group[-1], following[0])
            mean = sum(each.top[0][1] for each in group) / len(group)
            segments.append(Segment(start, end, group[0].top[0][0], mean))
        return segments

    def at(self, seconds: float) -> WindowPrediction | None:
        """The window whose centre is nearest; None without windows."""
        if not self.windows:
            return None

        def end(number: int) -> float:
            return _boundary(self.windows[number], self.windows[number + 1])

        return self.windows[bisect_right(range(len(self.windows) - 1), seconds, key=end)]


def output_names(names: tuple[str, ...], outputs: int) -> tuple[str, ...]:
    """One name per output; a model may have more outputs than its data has classes, but not fewer."""
    if len(names) > outputs:
        raise RunError(f"there are {len(names)} class names, but the model has {outputs} outputs")
    return (*names, *(f"output {number}" for number in range(len(names), outputs)))


def check_scores(scores: Tensor) -> None:
    """Raises RunError for nonfinite scores, as of a model whose values overflow float32."""
    if not bool(scores.isfinite().all()):
        raise RunError(
            "the model's scores are NaN: its weights are too large, or the std of its preprocessing is too "
            "small, for float32; use another checkpoint"
        )


def top_of(scores: NDArray[np.float32], names: Sequence[str], count: int) -> Top:
    """The `count` most likely classes, or all if there are fewer; the first among equal ones."""
    order = np.argsort(-scores, kind="stable")[:count]
    return tuple((names[number], float(scores[number])) for number in order.tolist())


def _boundary(one: WindowPrediction, other: WindowPrediction) -> float:
    return (one.start + one.end + other.start + other.end) / 4
