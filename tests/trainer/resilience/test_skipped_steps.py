import pytest

from trainer.errors import RunError
from trainer.resilience.skipped_steps import SkippedSteps


def test_as_many_as_allowed_are_told_and_one_more_stops() -> None:
    skipped = SkippedSteps(limit=2)
    assert skipped.add(7, "the loss is nan") == (
        "step 7 changed nothing, because the loss is nan; 1 of at most 2 such steps in this run"
    )
    assert "2 of at most 2" in skipped.add(9, "the gradient's norm is inf")
    with pytest.raises(
        RunError, match=r"step 12 changed nothing.* makes 3, and at most 2 such steps are allowed .*replay"
    ):
        skipped.add(12, "the loss is nan")


def test_none_allowed_stops_at_the_first() -> None:
    with pytest.raises(RunError, match="makes 1, and no such step is allowed "):
        SkippedSteps(limit=0).add(1, "the loss is nan")


def test_the_count_goes_on_from_earlier_starts_and_is_written_down() -> None:
    kept: list[int] = []
    skipped = SkippedSteps(limit=5, count=4, keep=kept.append)
    assert "5 of at most 5" in skipped.add(7, "the loss is nan")
    with pytest.raises(RunError):
        skipped.add(8, "the loss is nan")
    assert kept == [5, 6]
