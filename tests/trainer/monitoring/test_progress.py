"""Lines of progress where nobody watches."""

import time

import pytest

from trainer.monitoring.progress import ProgressLines


@pytest.mark.parametrize(("seconds", "rate"), [(1000.0, "1/s"), (80.0, "12.5/s"), (0.5, "2,000/s")])
def test_a_rate_is_in_plain_digits(monkeypatch: pytest.MonkeyPatch, seconds: float, rate: str) -> None:
    said: list[str] = []
    now = iter([0.0, seconds])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    ProgressLines("reading", said.append)(1000, 1000)
    assert said == [f"reading: 1000 of 1000, {rate}"]
