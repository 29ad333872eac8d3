"""When DALI's buffers are released, with fake CUDA events."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar
from unittest import mock
from weakref import ref

import pytest
import torch

from pipelines.dali.buffers import MOST, InUseBuffers


class Event:
    made: ClassVar[list["Event"]]

    def __init__(self) -> None:
        self.done = False
        Event.made.append(self)

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = True


@dataclass(eq=False)
class Clips:
    is_cuda: bool = True
    device: str = "cuda:0"
    pixels: list[float] = field(default_factory=list)


@pytest.fixture(autouse=True)
def events() -> Iterator[list[Event]]:
    Event.made = []
    with mock.patch.object(torch.cuda, "Event", Event):
        yield Event.made


def use(buffers: InUseBuffers) -> "ref[Clips]":
    buffers.release_finished()
    clips = Clips()
    buffers.hold(clips)  # type: ignore[arg-type]
    return ref(clips)


def test_a_buffer_is_held_until_the_work_with_it_is_done(events: list[Event]) -> None:
    buffers = InUseBuffers()
    first = use(buffers)
    second = use(buffers)
    assert first() is not None, "its work is queued and not done"
    events[0].done = True
    third = use(buffers)
    assert first() is None
    assert second() is not None
    assert third() is not None


def test_no_more_than_a_few_are_held(events: list[Event]) -> None:
    buffers = InUseBuffers()
    batches = [use(buffers) for _ in range(MOST + 3)]
    assert sum(batch() is not None for batch in batches) == MOST + 1, "and the latest one"
    assert [event.done for event in events] == [True, True, False, False]


def test_all_are_released_on_demand() -> None:
    buffers = InUseBuffers()
    batches = [use(buffers) for _ in range(2)]
    with mock.patch.object(torch.cuda, "synchronize") as waited:
        buffers.release_all()
    assert waited.call_count == 1
    assert [batch() for batch in batches] == [None, None]


def test_on_a_cpu_nothing_is_held() -> None:
    buffers = InUseBuffers()
    clips = Clips(is_cuda=False)
    buffers.hold(clips)  # type: ignore[arg-type]
    gone = ref(clips)
    del clips
    assert gone() is None
