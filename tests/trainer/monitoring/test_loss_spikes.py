"""Simulated runs; how rare false alarms are is held for these, a million steps each, by the soak test."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from trainer.monitoring.loss_spikes import LossSpike, LossSpikeDetector

Losses = NDArray[np.float64]


def falling(steps: int, rng: np.random.Generator) -> Losses:
    """From 5 to 0.5, fast at first, with the noise of a batch."""
    return 0.5 + 4.5 * np.exp(-np.arange(steps) / 300) + 0.05 * rng.standard_normal(steps)


def noisy(steps: int, rng: np.random.Generator) -> Losses:
    """Means of 8 clips' losses, which are skewed, around 1."""
    return rng.gamma(0.8, 1.25, (steps, 8)).mean(axis=1)


def learnt(steps: int, rng: np.random.Generator) -> Losses:
    """Of a model that has learnt nearly everything: most losses tiny, some a factor of ten larger."""
    return 0.01 * np.exp(0.7 * rng.standard_normal(steps))


def drifting(steps: int, rng: np.random.Generator) -> Losses:
    """Neighbours are alike, as where hard clips come together."""
    loss = np.zeros(steps)
    noise = 0.06 * rng.standard_normal(steps)
    for step in range(1, steps):
        loss[step] = 0.95 * loss[step - 1] + noise[step]
    return 3 + loss


def marked(losses: Losses) -> dict[int, LossSpike]:
    spikes = LossSpikeDetector()
    found = {step: spikes.detect(float(loss)) for step, loss in enumerate(losses)}
    return {step: spike for step, spike in found.items() if spike is not None}


@pytest.mark.parametrize("run", [falling, noisy, learnt, drifting])
def test_a_usual_run_has_none(run) -> None:
    assert marked(run(5_000, np.random.default_rng(1))) == {}


@pytest.mark.soak
@pytest.mark.parametrize(
    ("run", "most"), [(falling, 0), (noisy, 1), (learnt, 5), (drifting, 30)], ids=lambda value: str(value)
)
def test_false_alarms_in_a_million_steps(run, most: int) -> None:
    assert len(marked(run(1_000_000, np.random.default_rng(2)))) <= most


@pytest.mark.parametrize("run", [falling, drifting])
def test_a_loss_that_doubles_is_marked_once(run) -> None:
    losses = run(2_000, np.random.default_rng(3))
    losses[1_500:1_510] *= 2.5
    ((step, spike),) = marked(losses).items()
    assert step == 1_500
    assert spike.loss == losses[1_500]
    assert spike.usual == pytest.approx(float(np.median(losses[1_372:1_500])), rel=0.01)
    assert spike.deviations > 6


def test_a_spike_does_not_hide_the_next() -> None:
    losses = falling(2_000, np.random.default_rng(4))
    losses[[1_500, 1_504, 1_520]] = 4.0
    assert sorted(marked(losses)) == [1_500, 1_504, 1_520]


def test_a_loss_that_stays_up_becomes_the_usual_one() -> None:
    losses = falling(3_000, np.random.default_rng(5))
    losses[1_500:] += 3.0
    losses[2_500] = 12.0
    assert sorted(marked(losses)) == [1_500, 2_500]


def test_the_first_losses_and_those_that_are_not_finite_are_none() -> None:
    assert marked(np.array([1.0] * 20 + [100.0])) == {}
    steady = [1.0, 1.01] * 40
    assert marked(np.array([*steady, math.nan, math.inf, *steady])) == {}
    assert list(marked(np.array([*steady, math.nan, 3.0]))) == [81]


def test_a_loss_that_does_not_vary_is_not_marked_for_a_trifle() -> None:
    assert marked(np.array([0.5] * 200 + [0.54] + [0.0] * 200 + [0.04])) == {}
