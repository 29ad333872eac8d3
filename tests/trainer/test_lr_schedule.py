"""The learning-rate schedule, and after which steps a run evaluates and saves."""

import math

import pytest

from tests.trainer.engine.test_batch_plan import recipe
from trainer.lr_schedule import Schedule, describe_rate, warmup_cosine


def rate(step: int, total: int = 100, warmup: int = 10) -> float:
    return warmup_cosine(step, total_steps=total, warmup_steps=warmup, peak=1.0, start=0.1, end=0.2)


def test_the_rate_is_that_of_the_formula() -> None:
    assert rate(0) == 0.1
    assert rate(5) == pytest.approx(0.55)
    assert rate(10) == 1.0
    assert rate(55) == pytest.approx(0.6)
    assert rate(40) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 3)) / 2)
    assert rate(70) == pytest.approx(0.2 + 0.8 * (1 + math.cos(2 * math.pi / 3)) / 2)
    assert rate(100) == rate(1000) == 0.2


def test_the_rate_rises_then_falls() -> None:
    rates = [rate(step) for step in range(101)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_a_run_without_warm_up_and_one_of_nothing_else() -> None:
    assert rate(0, warmup=0) == 1.0
    assert [rate(step, total=2, warmup=2) for step in range(3)] == pytest.approx([0.1, 0.55, 0.2])


def test_evaluations_and_checkpoints_are_due_every_so_many_steps_but_not_after_the_last() -> None:
    schedule = Schedule(
        total_steps=6, warmup_steps=0, evaluation_interval=2, checkpoint_interval=3, recipe=recipe({})
    )
    steps = range(1, 7)
    assert [step for step in steps if schedule.evaluates_after(step)] == [2, 4]
    assert [step for step in steps if schedule.saves_after(step)] == [3]


@pytest.mark.parametrize("evaluation_interval", [6, None])
def test_a_run_without_an_evaluation_at_its_end_may_have_none(evaluation_interval: int | None) -> None:
    asked = recipe({})
    quiet = asked.model_copy(update={"evaluation": asked.evaluation.model_copy(update={"at_end": False})})
    assert not Schedule(6, 0, evaluation_interval, None, quiet).evaluates
    assert Schedule(7, 0, 6, None, quiet).evaluates
    assert Schedule(6, 0, evaluation_interval, None, asked).evaluates


@pytest.mark.parametrize(("reference", "scale"), [(None, 1.0), (512, 1.0), (1024, 0.5)])
def test_rates_are_kept_or_scaled_to_the_batch_and_the_log_says_which(
    reference: int | None, scale: float
) -> None:
    kept = recipe({})
    section = kept.optimisation.model_copy(update={"reference_batch": reference})
    scaled = kept.model_copy(update={"optimisation": section})
    before, after = Schedule.of(kept, 10), Schedule.of(scaled, 10)
    for step in range(6):
        assert after.learning_rate(step) == pytest.approx(scale * before.learning_rate(step), rel=1e-12)
    text = describe_rate(section)
    assert ("scaled to 512" in text) == (reference == 1024)
    assert ("not scaled" in text) == (reference is None)
