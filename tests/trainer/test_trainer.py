"""The order in which the training loop calls its parts."""

import gc
from typing import Any
from unittest import mock

import pytest

from trainer.distributed.step_sync import StepTotals
from trainer.errors import AgreedError
from trainer.system.garbage_collection import PlannedCollection
from trainer.trainer import Trainer

STEPS = 4


class Parts:
    """Stand-ins for the parts of a trainer, which record the calls that matter."""

    def __init__(self, *, stop_at: int | None = None, nonfinite: int | None = None) -> None:
        self.calls: list[str] = []
        self.saved_step, self.saving = -1, -1
        self.stop_at, self.nonfinite = stop_at, nonfinite
        self.finished: list[int] = []
        self.pending: StepTotals | None = None

    def note(self, text: str) -> None:
        self.calls.append(text)

    def trainer(self) -> Trainer:
        made = object.__new__(Trainer)
        for name in Trainer.__annotations__:
            setattr(made, name, mock.MagicMock(name=name))
        made.step, made.is_finite, made.misses_evaluation = 0, True, False
        fields: Any = made
        fields.schedule = mock.Mock(
            total_steps=STEPS,
            evaluates_at_end=True,
            saves_after=lambda done: done == 2,
            evaluates_after=lambda done: done == 3,
        )
        fields.train_step = lambda batches: self.train_step(made)
        fields.exchange = lambda sums: self.exchange(made)
        fields.step_sync = mock.Mock(read_pending=self.read_pending)
        fields.engine.finish_step = self.finish_step
        fields.run_logger.log_step = lambda totals, *_: self.note(f"log {totals.step + 1}")
        fields.bad_clips = mock.Mock(is_exceeded=False, clips=0, bad=0)
        fields.validator.evaluate = lambda step, writes_scores: (
            self.note(f"evaluate {step}{' with scores' * writes_scores}") or mock.Mock(videos=1, top1=0.5)
        )
        owner = fields.checkpointer = mock.Mock(can_retry=False, saved_step=-1)
        owner.poll = lambda totals: None
        owner.has = lambda step: step in (owner.saved_step, self.saving)
        owner.begin = self.begin
        owner.wait = lambda: self.wait(owner)
        owner.confirm = lambda step: self.note(f"confirm {step}")
        owner.withdraw = lambda reason: self.note("withdraw")
        owner.postpone = lambda: self.note("postpone")
        owner.record_accuracy = lambda step, top1: False
        owner.describe_newest = lambda: "there is no checkpoint"
        fields.skipped.add = lambda step, reason: f"step {step}"
        return made

    def train_step(self, trainer: Trainer) -> None:
        trainer.finish_previous_step()  # as a real step does before it changes the weights
        self.note(f"train {trainer.step + 1}")
        self.finished.append(trainer.step + 1)

    def finish_step(self) -> bool | None:
        return self.finished.pop() != self.nonfinite if self.finished else None

    def exchange(self, trainer: Trainer) -> StepTotals | None:
        before, step = self.pending, trainer.step
        self.pending = StepTotals(step, 0.0, "0" * 16, 8, 0, 0, int(step + 1 == self.stop_at), False, 0)
        return before

    def read_pending(self) -> StepTotals | None:
        totals, self.pending = self.pending, None
        return totals

    def begin(self, engine: Any, progress: Any) -> bool:
        self.note(f"save {progress.step}")
        self.saving = progress.step
        return True

    def wait(self, owner: Any) -> None:
        if self.saving > 0:
            self.note(f"saved {self.saving}")
            owner.saved_step, self.saving = self.saving, -1


def test_a_training_in_its_order() -> None:
    """A step is logged after the next one; before a save or an evaluation its totals are read at once."""
    parts = Parts()
    assert parts.trainer().fit()
    assert parts.calls == [
        "train 1",
        "confirm 0",
        "train 2",
        "log 1",
        "confirm 1",
        "log 2",
        "save 2",
        "train 3",
        "confirm 2",
        "log 3",
        "evaluate 3",
        "train 4",
        "confirm 3",
        "log 4",
        "saved 2",
        "save 4",
        "saved 4",
        "evaluate 4 with scores",
        "confirm 4",
    ]


def test_a_stop_request_saves_the_latest_step_and_evaluates_nothing() -> None:
    parts = Parts(stop_at=1)
    assert not parts.trainer().fit()
    assert parts.calls[-2:] == ["save 2", "saved 2"] and "train 3" not in parts.calls
    assert not any(call.startswith("evaluate") for call in parts.calls)


def test_a_step_that_is_not_finite_is_not_saved() -> None:
    """The schedule saves after step 2, which is not finite: the save is postponed."""
    parts = Parts(nonfinite=2)
    assert parts.trainer().fit()
    assert parts.calls.index("withdraw") < parts.calls.index("postpone") < parts.calls.index("train 3")
    assert "save 2" not in parts.calls and "saved 4" in parts.calls


def test_a_last_step_that_is_not_finite_ends_the_run_with_an_error() -> None:
    parts = Parts(nonfinite=STEPS)
    with pytest.raises(AgreedError, match=f"the last step, {STEPS}"):
        parts.trainer().fit()
    assert f"save {STEPS}" not in parts.calls and f"evaluate {STEPS} with scores" not in parts.calls


def test_garbage_is_collected_after_each_step_and_not_within() -> None:
    """Automatically in evaluations only; as before the training afterwards, after an error too."""
    parts = Parts(nonfinite=STEPS)
    trainer = parts.trainer()
    states: dict[str, bool] = {}
    trainer.garbage = PlannedCollection()
    fields: Any = trainer
    fields.garbage.collect_after = lambda step: parts.note(f"collect {step}")
    fields.exchange = lambda sums: states.update(step=gc.isenabled())
    fields.validator.evaluate = lambda step, writes_scores: (
        states.update(evaluation=gc.isenabled()) or mock.Mock(videos=1, top1=0.5)
    )
    with pytest.raises(AgreedError):
        trainer.fit()
    assert states == {"step": False, "evaluation": True} and gc.isenabled()
    assert [call for call in parts.calls if call.startswith("collect")] == [
        f"collect {step}" for step in range(1, STEPS + 1)
    ]


def test_an_evaluation_that_an_earlier_attempt_missed_comes_first() -> None:
    parts = Parts()
    trainer = parts.trainer()
    trainer.step, trainer.misses_evaluation = 3, True
    assert trainer.fit()
    assert parts.calls[:2] == ["evaluate 3", "train 4"]
    trainer = Parts().trainer()
    trainer.misses_evaluation = True
    fields: Any = trainer
    fields.validator.evaluate = lambda step, writes_scores: None  # a rank was asked to stop meanwhile
    assert not trainer.fit() and trainer.step == 0
