"""Statistics against numbers counted by hand, and against SciPy."""

import time
import tracemalloc

import numpy as np
import pytest
from scipy.stats import binomtest

from trainer.evaluation.significance import PairedCounts, bootstrap_interval, count_pairs, holm, mcnemar


def discordant(b: int, c: int, both: int = 0, neither: int = 0) -> PairedCounts:
    return PairedCounts(both, b, c, neither)


def test_pairs_are_counted_by_who_was_right() -> None:
    first = np.array([1, 1, 1, 0, 0, 1, 0], bool)
    second = np.array([1, 0, 1, 1, 1, 0, 0], bool)
    counts = count_pairs(first, second)
    assert counts == PairedCounts(both=2, only_first=2, only_second=2, neither=1)
    assert (counts.videos, counts.difference) == (7, 0.0)
    assert discordant(1, 4, both=5).difference == 0.3
    with pytest.raises(ValueError, match="7 outcomes"):
        count_pairs(first, second[:-1])


def test_mcnemar_by_hand() -> None:
    # 1 against 4: 2 (C(5,0) + C(5,1)) / 2^5 = 12/32; 0 against 5: 2/32.
    assert mcnemar(discordant(1, 4)) == pytest.approx(0.375, rel=1e-14)
    assert mcnemar(discordant(5, 0)) == pytest.approx(0.0625, rel=1e-14)
    assert mcnemar(discordant(3, 3)) == 1.0
    assert mcnemar(discordant(0, 0, both=10)) == 1.0
    assert mcnemar(discordant(2, 3)) == 1.0  # 2 * 16/32


@pytest.mark.parametrize(
    ("b", "c"), [(0, 1), (1, 2), (10, 25), (37, 91), (500, 560), (4000, 4321), (100_000, 101_500), (7, 2000)]
)
def test_mcnemar_is_scipys_binomial_test(b: int, c: int) -> None:
    expected = binomtest(b, b + c, 0.5).pvalue
    assert mcnemar(discordant(b, c)) == pytest.approx(expected, rel=1e-8)
    assert mcnemar(discordant(c, b)) == mcnemar(discordant(b, c))


def test_the_interval_is_that_of_resampled_videos() -> None:
    counts = discordant(30, 55, both=300, neither=115)
    low, high = bootstrap_interval(counts)
    outcome = np.repeat([0, -1, 1, 0], [300, 30, 55, 115])
    rng = np.random.default_rng(2)
    means = [rng.choice(outcome, outcome.size).mean() for _ in range(4000)]
    assert (low, high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=0.004)
    # sqrt((b + c) - (b - c)^2 / N) / N = 0.0183 is the deviation; the interval is 1.96 of them to each side.
    assert (low, high) == pytest.approx((0.05 - 1.96 * 0.01828, 0.05 + 1.96 * 0.01828), abs=0.002)
    assert bootstrap_interval(counts) == (low, high)


def test_what_never_differs_has_an_interval_of_zero() -> None:
    assert bootstrap_interval(discordant(0, 0, both=5, neither=5)) == (0.0, 0.0)
    assert bootstrap_interval(discordant(0, 0)) == (0.0, 0.0)


def test_the_interval_of_many_videos_takes_little_time_and_memory() -> None:
    tracemalloc.start()
    begin = time.perf_counter()
    bootstrap_interval(discordant(10**6, 10**6 + 5000, both=10**8))
    assert time.perf_counter() - begin < 5
    assert tracemalloc.get_traced_memory()[1] < 2**21
    tracemalloc.stop()


def test_holm_by_hand() -> None:
    # 0.01 x 4; 0.02 x 3; 0.03 x 2 = 0.06, no less than the one before; 0.5 x 1.
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.04, 0.03]) == pytest.approx([0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
