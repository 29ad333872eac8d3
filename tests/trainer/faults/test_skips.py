import pytest

from trainer import RunError
from trainer.faults.skips import SkippedSteps


def test_as_many_as_allowed_are_told_and_one_more_stops() -> None:
    skipped = SkippedSteps(limit=2)
    assert skipped.add(7, "the loss is nan") == (
        "step 7 changed nothing, because the loss is nan; 1 of at most 2 such steps since this start"
    )
    assert "2 of at most 2" in skipped.add(9, "the gradient's norm is inf")
    with pytest.raises(
        RunError, match=r"step 12 changed nothing.* at most 2 such steps are allowed .*replay"
    ):
        skipped.add(12, "the loss is nan")


def test_none_allowed_stops_at_the_first() -> None:
    with pytest.raises(RunError, match="no such step is allowed since this start"):
        SkippedSteps(limit=0).add(1, "the loss is nan")
