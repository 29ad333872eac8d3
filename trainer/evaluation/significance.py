"""Significance of a difference between two models on the same videos: McNemar, paired bootstrap, Holm.

The tests concern these weights on these videos. They do not show that trainings with other seeds would differ
in the same way; for that, compare groups of seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr

RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class PairedCounts:
    """Number of videos by which of two models is right."""

    both: int
    only_first: int
    only_second: int
    neither: int

    @property
    def videos(self) -> int:
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def difference(self) -> float:
        """Accuracy of the second model minus that of the first, -1..1; 0 without videos."""
        return (self.only_second - self.only_first) / self.videos if self.videos else 0.0


def count_pairs(first: np.ndarray, second: np.ndarray) -> PairedCounts:
    """Count outcomes by pairs. first, second: (N,) bool, whether each model was right on each video.

    Raises ValueError where the lengths differ.
    """
    if first.shape != second.shape:
        raise ValueError(f"{first.size} outcomes of the first model, {second.size} of the second")
    both, right, other = (int(np.count_nonzero(x)) for x in (first & second, first, second))
    return PairedCounts(both, right - both, other - both, first.size - right - other + both)


def mcnemar(counts: PairedCounts) -> float:
    """Two-sided exact p-value of McNemar's test.

    On n = b + c videos exactly one model is right; under the null hypothesis each model with probability 1/2:
    p = min(1, 2 P(X <= min(b, c))), X ~ Binomial(n, 1/2). 1 if n = 0.
    """
    low, high = sorted((counts.only_first, counts.only_second))
    return min(1.0, 2 * float(bdtr(low, low + high, 0.5)))


def bootstrap_interval(counts: PairedCounts) -> tuple[float, float]:
    """Percentile interval of the difference in accuracy (second minus first) under resampling of the videos.

    The counts of N videos drawn with replacement are multinomial. Drawing these counts needs memory for the
    resamples only, not for N videos.
    """
    if not counts.videos:
        return 0.0, 0.0
    shares = np.array([counts.only_first, counts.only_second, counts.both + counts.neither]) / counts.videos
    drawn = np.random.default_rng(0).multinomial(counts.videos, shares, size=RESAMPLES)
    differences = (drawn[:, 1] - drawn[:, 0]) / counts.videos
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(differences, [tail, 100 - tail])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of m tests, in their order (Holm 1979).

    With p(1) <= ... <= p(m): adjusted p(i) = max over j <= i of min(1, (m - j + 1) p(j)).
    """
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted
