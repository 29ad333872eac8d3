"""Lines of progress where nobody watches."""

import time

import pytest

from trainer.monitoring.progress import ProgressLines


def lines(monkeypatch: pytest.MonkeyPatch, seconds: float, *calls: tuple[int, int]) -> list[str]:
    """What is printed by calls that come so many seconds after the beginning."""
    said: list[str] = []
    now = iter([0.0, *[seconds] * len(calls)])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    show = ProgressLines("reading", said.append)
    for call in calls:
        show(*call)
    return said


@pytest.mark.parametrize(
    ("seconds", "rate"),
    [(1000.0, "1/s"), (80.0, "12.5/s"), (0.5, "2,000/s"), (33_000.0, "33 s each")],
)
def test_a_rate_is_in_plain_digits(monkeypatch: pytest.MonkeyPatch, seconds: float, rate: str) -> None:
    assert lines(monkeypatch, seconds, (1000, 1000)) == [f"reading: 1000 of 1000, {rate}"]


def test_a_single_item_has_its_duration(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines(monkeypatch, 33.3, (1, 1)) == ["reading: 1 of 1, 33.3 s"]


def test_nothing_done_has_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines(monkeypatch, 20.0, (0, 3)) == ["reading: 0 of 3"]
    assert lines(monkeypatch, 20.0, (0, 0)) == ["reading: 0 of 0"]
    assert lines(monkeypatch, 20.0, (1, 3)) == ["reading: 1 of 3, 20 s each, 40 s left"]
