"""What is said of a model, computed from counts: pure functions, each with its formula."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOP = 5
"""A video counts for top-5 where fewer than so many classes are ahead of its own."""

BINS = 15
"""Of confidence, as wide as one another, as in Guo et al. 2017 (arXiv:1706.04599)."""

LOSS_UNIT = 2.0**-24
"""Losses are added up in whole multiples of it. So their sum is the same in any order, and for any number of
ranks; the largest, 87.4, fits 6 * 10^9 times into an int64."""

CONFIDENCE_UNIT = 2.0**-32
"""The same for confidences: 2 * 10^9 of them fit."""

SMALLEST_SCORE = torch.finfo(torch.float32).tiny
"""Taken in place of a smaller score in the loss, whose logarithm would be infinite."""

MOST_CONFUSED = 20
"""Pairs of classes that a report names."""


@dataclass(frozen=True)
class Outcomes:
    """What came out for each of B videos.

    predictions: (B,) int64, the class with the highest score; of equal ones the lowest index. in_top5: (B,)
    bool, whether fewer than five classes are ahead of the true one: those with a higher score, and those with
    an equal one and a lower index. losses, confidences: (B,) int64 in `LOSS_UNIT` and `CONFIDENCE_UNIT`.
    finite: (B,) bool, whether all scores are; the others' outcome means nothing.
    """

    predictions: Tensor
    in_top5: Tensor
    losses: Tensor
    confidences: Tensor
    finite: Tensor


def outcomes_of(scores: Tensor, labels: Tensor) -> Outcomes:
    """Compare scores with labels.

    The loss is the cross-entropy of the averaged scores, -ln(s_y) for label y; not the mean of the views'
    losses, which is higher.

    Args:
        scores: (B, K) float32, each row a distribution over the classes: the mean softmax of a video's views.
        labels: (B,) int64, 0..K-1; of a video without a label -1, whose outcome means nothing.
    """
    finite = scores.isfinite().all(dim=1)
    scores = torch.where(finite[:, None], scores, 1.0)
    labels = labels.clamp(min=0)[:, None]
    own = scores.gather(1, labels)  # B 1
    classes = torch.arange(scores.shape[1], device=scores.device)
    ahead = (scores > own) | ((scores == own) & (classes < labels))
    best, predictions = scores.max(dim=1).values, scores.argmax(dim=1)  # argmax gives the first of equal ones
    losses = -own[:, 0].double().clamp(min=SMALLEST_SCORE).log()
    return Outcomes(
        predictions,
        ahead.sum(dim=1) < TOP,
        (losses / LOSS_UNIT).round().long(),
        (best.double() / CONFIDENCE_UNIT).round().long(),
        finite,
    )


@dataclass(frozen=True)
class CalibrationBin:
    """Videos whose confidence, the score of the predicted class, lies between lower and upper.

    confidence: their mean confidence. accuracy: share of them whose prediction is right. Both NaN where there
    are none.
    """

    lower: float
    upper: float
    videos: int
    confidence: float
    accuracy: float


def reliability(bins: Tensor) -> list[CalibrationBin]:
    """The reliability table.

    bins: (3, BINS) int64: videos, their confidences in `CONFIDENCE_UNIT`, those of them that are right.
    """
    count = bins.shape[1]
    return [
        CalibrationBin(
            number / count,
            (number + 1) / count,
            videos,
            confidence * CONFIDENCE_UNIT / videos if videos else math.nan,
            right / videos if videos else math.nan,
        )
        for number, (videos, confidence, right) in enumerate(bins.t().tolist())
    ]


def calibration_error(bins: Tensor) -> float:
    """The expected calibration error, sum over bins b of n_b / n * |accuracy_b - confidence_b|; NaN without
    videos. bins: as `reliability` takes them.
    """
    table = [part for part in reliability(bins) if part.videos]
    videos = sum(part.videos for part in table)
    if not videos:
        return math.nan
    return math.fsum(part.videos * abs(part.accuracy - part.confidence) for part in table) / videos


def bin_of(confidences: Tensor) -> Tensor:
    """The bin, 0..BINS-1, of each confidence in `CONFIDENCE_UNIT`, int64."""
    # Whole numbers. No multiple of 1/15 but 0 and 1 is one of the unit's: none lies on an edge between bins.
    return (confidences * BINS // round(1 / CONFIDENCE_UNIT)).clamp(0, BINS - 1)


@dataclass(frozen=True)
class ClassAccuracy:
    """Of one class: its videos, those of them predicted as it, and all videos predicted as it."""

    label: int
    videos: int
    correct: int
    predicted: int

    @property
    def accuracy(self) -> float:
        """correct / videos; NaN without a video."""
        return self.correct / self.videos if self.videos else math.nan


def per_class(confusion: Tensor) -> list[ClassAccuracy]:
    """Each class of a (K, K) matrix of counts, row the true class, column the predicted one."""
    columns = zip(
        confusion.sum(dim=1).tolist(),
        confusion.diagonal().tolist(),
        confusion.sum(dim=0).tolist(),
        strict=True,
    )
    return [ClassAccuracy(label, *numbers) for label, numbers in enumerate(columns)]


def mean_class_accuracy(classes: Sequence[ClassAccuracy]) -> float:
    """The mean of the accuracies of the classes that have a video; NaN where none has."""
    known = [one.accuracy for one in classes if one.videos]
    return math.fsum(known) / len(known) if known else math.nan


@dataclass(frozen=True)
class ConfusedPair:
    """Videos of one class that were taken for another. share: of the true class's videos."""

    true: int
    predicted: int
    videos: int
    share: float


def most_confused(confusion: Tensor, most: int = MOST_CONFUSED) -> list[ConfusedPair]:
    """The pairs of different classes with the most videos, at most so many; ties in the order of labels.

    confusion: (K, K) counts, row the true class, column the predicted one.
    """
    classes = len(confusion)
    wrong = confusion.clone().fill_diagonal_(0).flatten()
    order = wrong.argsort(descending=True, stable=True)[:most].tolist()
    of_class = confusion.sum(dim=1).tolist()
    pairs = []
    for place in order:
        videos, true = int(wrong[place]), place // classes
        if videos:
            pairs.append(ConfusedPair(true, place % classes, videos, videos / of_class[true]))
    return pairs
