"""The outbox on disk, and the thread that empties it."""

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.tracking import uploader
from trainer.tracking.outbox import Outbox
from trainer.tracking.uploader import Uploader


def lines(outbox: Outbox) -> list[dict]:
    return [json.loads(line) for _, line in outbox.undelivered()]


def test_records_come_back_in_order_until_they_are_delivered(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    assert lines(outbox) == []
    for number in range(3):
        outbox.append({"n": number, "text": "ü\n"})
    ends = [end for end, _ in outbox.undelivered()]
    outbox.mark_delivered(ends[0])
    again = Outbox(tmp_path)
    assert [record["n"] for record in lines(again)] == [1, 2]
    assert again.count_undelivered() == 2


def test_a_record_is_on_disk_when_append_returns(tmp_path: Path) -> None:
    Outbox(tmp_path).append({"n": 1})
    assert (tmp_path / "mlflow.jsonl").read_text() == '{"n": 1}\n'


def test_numbers_that_json_lacks_are_written_as_text(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.append({"values": {"a": float("nan"), "b": float("-inf"), "c": 1.5}})
    assert lines(outbox) == [{"values": {"a": "nan", "b": "-inf", "c": 1.5}}]


def test_an_incomplete_line_is_not_read_and_damages_no_other(tmp_path: Path) -> None:
    Outbox(tmp_path).append({"n": 1})
    with (tmp_path / "mlflow.jsonl").open("a") as file:
        file.write('{"n": 2, "val')
    outbox = Outbox(tmp_path)
    assert outbox.count_undelivered() == 1
    outbox.append({"n": 3})
    texts = [line for _, line in outbox.undelivered()]
    assert texts == [b'{"n": 1}\n', b'{"n": 2, "val\n', b'{"n": 3}\n']


def test_a_deleted_outbox_starts_empty(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.append({"n": 1, "long": "x" * 100})
    outbox.mark_delivered(max(end for end, _ in outbox.undelivered()))
    (tmp_path / "mlflow.jsonl").unlink()
    fresh = Outbox(tmp_path)
    fresh.append({"n": 2})
    assert lines(fresh) == [{"n": 2}]


def test_only_one_process_uploads_at_a_time(tmp_path: Path) -> None:
    with Outbox(tmp_path).delivery_lock() as first, Outbox(tmp_path).delivery_lock() as second:
        assert (first, second) == (True, False)
    with Outbox(tmp_path).delivery_lock() as later:
        assert later


def taking_everything(outbox: Outbox, taken: list[dict]) -> Callable[[], None]:
    def deliver() -> None:
        for end, line in outbox.undelivered():
            taken.append(json.loads(line))
            outbox.mark_delivered(end)

    return deliver


def test_the_uploader_sends_everything_before_it_ends(tmp_path: Path) -> None:
    outbox, taken = Outbox(tmp_path), []
    busy = Uploader(outbox, lambda: taking_everything(outbox, taken))
    for number in range(100):
        outbox.append({"n": number})
        busy.notify()
    assert busy.close(timeout=60) == 0
    assert [record["n"] for record in taken] == list(range(100))


def test_the_uploader_waits_for_later_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploader, "GATHER", 0.001)
    outbox, rounds = Outbox(tmp_path), threading.Semaphore(0)

    def deliver() -> None:
        for end, _ in list(outbox.undelivered()):
            outbox.mark_delivered(end)
            rounds.release()

    patient = Uploader(outbox, lambda: deliver)
    for number in range(3):
        outbox.append({"n": number})
        patient.notify()
        assert rounds.acquire(timeout=60)
    assert patient.close(timeout=60) == 0


def test_the_uploader_survives_an_outage_and_logs_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(uploader, "FIRST_PAUSE", 0.001)
    outbox, taken, failures = Outbox(tmp_path), [], iter(range(5))
    back = threading.Event()

    def connect() -> Callable[[], None]:
        for _ in failures:
            raise ConnectionError("nobody there\nand a page of HTML")
        back.set()
        return taking_everything(outbox, taken)

    outbox.append({"n": 1})
    patient = Uploader(outbox, connect)
    assert back.wait(60)
    assert patient.close(timeout=60) == 0
    assert taken == [{"n": 1}]
    failed, works = (record.getMessage() for record in caplog.records)
    assert "nobody there" in failed and "HTML" not in failed
    assert "works again" in works


def test_the_uploader_gives_up_in_time_and_returns_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(uploader, "FIRST_PAUSE", 0.001)
    outbox = Outbox(tmp_path)

    def connect() -> Callable[[], None]:
        raise ConnectionError("nobody there")

    outbox.append({"n": 1})
    outbox.append({"n": 2})
    with caplog.at_level(logging.WARNING):
        assert Uploader(outbox, connect).close(timeout=0.05) == 2
    assert len(caplog.records) == 1
