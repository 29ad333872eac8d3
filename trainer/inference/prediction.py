"""What a model says of a video, or of the windows of a long one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from trainer.errors import RunError

Top = tuple[tuple[str, float], ...]
"""Classes by likelihood, the most likely first, each with its probability."""


@dataclass(frozen=True)
class Prediction:
    """Of one video.

    top: the most likely classes. scores: (K,) probabilities of all classes, in the order of the model's
    outputs. error: why the video could not be used, in words that follow its name; then the others are empty.
    """

    path: Path
    top: Top = ()
    scores: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    error: str = ""


@dataclass(frozen=True, slots=True)
class WindowPrediction:
    """Of one window. start, end: seconds from the first frame."""

    start: float
    end: float
    top: Top


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of time with one most likely class. probability: the mean over its windows."""

    start: float
    end: float
    name: str
    probability: float


@dataclass(frozen=True)
class Timeline:
    """Of one video, window by window. error: why its rest could not be used; what is before it is there."""

    path: Path
    windows: tuple[WindowPrediction, ...]
    error: str = ""

    @property
    def segments(self) -> list[Segment]:
        """Windows that follow one another with the same most likely class, as one.

        Between two windows, the class changes halfway between their centres: that is where one ends and the
        next begins when they do not overlap.
        """
        segments: list[Segment] = []
        begun = 0
        for number, window in enumerate(self.windows):
            following = self.windows[number + 1] if number + 1 < len(self.windows) else None
            if following is not None and following.top[0][0] == window.top[0][0]:
                continue
            end = window.end if following is None else _between(window, following)
            group = self.windows[begun : number + 1]
            start = segments[-1].end if segments else group[0].start
            mean = sum(each.top[0][1] for each in group) / len(group)
            segments.append(Segment(start, end, window.top[0][0], mean))
            begun = number + 1
        return segments

    def at(self, seconds: float) -> WindowPrediction | None:
        """The window whose centre is nearest; None where there is no window."""
        if not self.windows:
            return None
        low, high = 0, len(self.windows) - 1
        while low < high:
            middle = (low + high) // 2
            if _between(self.windows[middle], self.windows[middle + 1]) <= seconds:
                low = middle + 1
            else:
                high = middle
        return self.windows[low]


def check_scores(scores: Tensor) -> None:
    """Raises RunError where scores are no numbers, as of a model whose sums are too large for float32."""
    if not bool(scores.isfinite().all()):
        raise RunError(
            "the model's scores are not numbers (NaN): its weights are too large, or the std of its "
            "preprocessing is too small, for float32; take another checkpoint"
        )


def top_of(scores: NDArray[np.float32], names: Sequence[str], count: int) -> Top:
    """The `count` most likely classes, or all where there are fewer; of equal ones the first."""
    order = np.argsort(-scores, kind="stable")[:count]
    return tuple((names[number], float(scores[number])) for number in order.tolist())


def _between(one: WindowPrediction, other: WindowPrediction) -> float:
    return (one.start + one.end + other.start + other.end) / 4
