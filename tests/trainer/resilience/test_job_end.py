"""Leaving before the scheduler ends the job."""

import time

import pytest

from trainer.resilience.process_identity import process_age
from trainer.resilience.signals import TIME_LIMIT, StopRequest


def test_the_end_of_the_job_leaves_the_margin() -> None:
    # This process has lived for less than a hundred thousand seconds.
    end = time.time() + 200_000
    assert StopRequest(job_end=end, margin=lambda: 99_000.0).poll() is None
    assert StopRequest(job_end=time.time() + 10, margin=lambda: 9.0).poll() is None
    assert StopRequest(job_end=time.time() + 0.5, margin=lambda: 1.0).poll() == TIME_LIMIT
    assert StopRequest(job_end=time.time() - 1).poll() == TIME_LIMIT


def test_the_earlier_of_limit_and_end_counts() -> None:
    lived = process_age() / 60
    assert StopRequest(time_limit=lived + 60, job_end=time.time() - 1).poll() == TIME_LIMIT
    assert StopRequest(time_limit=1e-9, job_end=time.time() + 3600).poll() == TIME_LIMIT
    assert StopRequest(time_limit=lived + 60, job_end=time.time() + 3600).poll() is None


def test_setting_the_clock_meanwhile_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopRequest(job_end=time.time() + 3600)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 86_400)
    assert stop.poll() is None


def test_a_margin_leaves_half_of_the_time_for_work() -> None:
    lived = process_age()
    short = StopRequest(job_end=time.time() + lived + 60, margin=lambda: 1e6)
    assert short.poll() is None, "no start of the run would get anywhere"
    assert StopRequest(job_end=time.time() + lived / 2, margin=lambda: 1e6).poll() == TIME_LIMIT
