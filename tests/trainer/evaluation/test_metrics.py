"""Metrics, compared with numbers computed by hand."""

import math

import pytest
import torch

from trainer.evaluation.metrics import (
    BINS,
    CONFIDENCE_UNIT,
    LOSS_UNIT,
    bin_of,
    calibration_error,
    mean_class_accuracy,
    most_confused,
    outcomes_of,
    per_class,
    reliability,
)
from trainer.evaluation.multi_view import EvaluationResult, OutcomeCounts

SCORES = torch.tensor(
    [
        [0.75, 0.125, 0.125],  # right, confidence 0.75
        [0.25, 0.5, 0.25],  # right, confidence 0.5
        [0.5, 0.25, 0.25],  # of class 1: wrong
        [0.75, 0.125, 0.125],  # of class 2: wrong
    ]
)
LABELS = torch.tensor([0, 1, 1, 2])


def counted(scores: torch.Tensor, labels: torch.Tensor, valid: list[bool] | None = None) -> EvaluationResult:
    readable = torch.tensor([True] * len(labels) if valid is None else valid)
    counts = OutcomeCounts(scores.shape[1], torch.device("cpu"))
    counts.add(outcomes_of(scores, labels), labels, readable, torch.ones(len(labels), dtype=torch.bool))
    return counts.result()


def test_counts_of_four_videos() -> None:
    result = counted(SCORES, LABELS)
    assert (result.videos, result.top1, result.top5, result.bad) == (4, 0.5, 1.0, 0)
    assert result.confusion.tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 0]]
    # -(ln 3/4 + ln 1/2 + ln 1/4 + ln 1/8) / 4
    assert result.loss == pytest.approx(
        (math.log(4 / 3) + math.log(2) + math.log(4) + math.log(8)) / 4, abs=1e-7
    )
    # Confidence 0.75 twice, one right; 0.5 twice, one right: (2 * |0.5 - 0.75| + 2 * |0.5 - 0.5|) / 4
    assert result.ece == pytest.approx(0.125, abs=1e-9)
    classes = per_class(result.confusion)
    assert [(one.videos, one.correct, one.predicted) for one in classes] == [(1, 1, 3), (2, 1, 1), (1, 0, 0)]
    assert mean_class_accuracy(classes) == pytest.approx((1 + 0.5 + 0) / 3)
    pairs = most_confused(result.confusion)
    assert [(pair.true, pair.predicted, pair.videos, pair.share) for pair in pairs] == [
        (1, 0, 1, 0.5),
        (2, 0, 1, 1.0),
    ]
    assert most_confused(result.confusion, 1) == pairs[:1]


def test_counts_of_seven_classes_in_two_batches() -> None:
    # Ranks of the classes, best first: 6 5 4 3 2 1 0 for the first two videos, 0 1 2 3 4 5 6 for the others.
    rising = torch.tensor([[0.04, 0.06, 0.1, 0.15, 0.18, 0.22, 0.25]])
    scores = torch.cat([rising, rising, rising.flip(1), rising.flip(1)])
    labels = torch.tensor([6, 1, 4, 5])
    counts = OutcomeCounts(7, torch.device("cpu"))
    for part in (slice(0, 3), slice(3, 4)):
        there = torch.ones(len(labels[part]), dtype=torch.bool)
        counts.add(outcomes_of(scores[part], labels[part]), labels[part], there, there)
    result = counts.result()
    # Top 1: video 0. Top 5: videos 0 (rank 1) and 2 (rank 5); videos 1 and 3 have rank 6.
    assert (result.videos, result.top1, result.top5) == (4, 1 / 4, 2 / 4)
    confusion = torch.zeros(7, 7, dtype=torch.int64)
    confusion[6, 6] = confusion[1, 6] = confusion[4, 0] = confusion[5, 0] = 1
    assert result.confusion.equal(confusion)


def test_a_bad_video_counts_nowhere_else() -> None:
    result = counted(SCORES, LABELS, [True, True, True, False])
    assert (result.videos, result.bad) == (3, 1)
    assert result.top1 == pytest.approx(2 / 3)


def test_of_equal_scores_the_lower_class_index_ranks_first() -> None:
    labels = torch.arange(8)
    outcomes = outcomes_of(torch.full((8, 8), 0.125), labels)
    assert outcomes.predictions.tolist() == [0] * 8
    assert outcomes.in_top5.tolist() == [True] * 5 + [False] * 3


def test_top5_of_six_classes() -> None:
    scores = torch.tensor([[0.3, 0.25, 0.2, 0.15, 0.06, 0.04]]).repeat(6, 1)
    assert outcomes_of(scores, torch.arange(6)).in_top5.tolist() == [True] * 5 + [False]


def test_a_score_of_zero_has_a_loss_that_is_finite() -> None:
    outcomes = outcomes_of(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    assert outcomes.losses.item() * LOSS_UNIT == pytest.approx(126 * math.log(2), abs=1e-6)


def test_bins_have_equal_width() -> None:
    unit = round(1 / CONFIDENCE_UNIT)
    confidences = torch.tensor(
        [0, 1, unit // 15, unit // 15 + 1, unit // 3, unit // 3 + 1, unit - 1, unit, unit + 9]
    )
    assert bin_of(confidences).tolist() == [0, 0, 0, 1, 4, 5, 14, 14, 14]


def test_a_bin_without_videos_has_no_accuracy() -> None:
    bins = torch.zeros(3, BINS, dtype=torch.int64)
    assert math.isnan(calibration_error(bins))
    bins[:, 7] = torch.tensor([4, 2 * round(1 / CONFIDENCE_UNIT), 1])  # confidence 0.5, a quarter right
    table = reliability(bins)
    assert math.isnan(table[0].accuracy) and (table[7].confidence, table[7].accuracy) == (0.5, 0.25)
    assert (table[7].lower, table[7].upper) == (7 / 15, 8 / 15)
    assert calibration_error(bins) == 0.25


def test_sums_are_the_same_in_any_order() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1000, 7, generator=generator).softmax(dim=1)
    labels = torch.randint(7, (1000,), generator=generator)
    order = torch.randperm(1000, generator=generator)
    one, other = counted(scores, labels), counted(scores[order], labels[order])
    assert (one.loss, one.ece, one.top1, one.top5) == (other.loss, other.ece, other.top1, other.top5)
    mean = torch.nn.functional.nll_loss(scores.double().log(), labels).item()
    assert one.loss == pytest.approx(mean, abs=LOSS_UNIT)
