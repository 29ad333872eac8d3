"""Events as a stream: thinned, in bounded memory, for any contents of the file."""

import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from trainer.tracking.comparison import events as module
from trainer.tracking.comparison.events import batch_hashes, event_lines, read_curve, read_events


def step(number: int, loss: float = 1.0, **more: object) -> str:
    return json.dumps({"event": "step", "step": number, "loss": loss, "spent": 2.0 * number, **more}) + "\n"


def test_lines_of_any_length_and_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LONGEST", 20)
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"one\n\n" + b"x" * 50 + b"\ntwo\nthree and some more\n" + b"y" * 21 + b"\nfour")
    assert list(event_lines(path)) == [b"one", b"", b"two", b"three and some more", b"four"]
    path.write_bytes(b"z" * 50)
    assert list(event_lines(path)) == []


def test_a_pipe_is_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="ordinary"):
        read_events(tmp_path / "pipe")


def test_damaged_lines_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    evaluation = '{"event": "evaluation", "step": 2, "top1": 0.5, "top5": 7}\n'
    damaged = [
        "{", "[]", "null", "\x00\xff", '{"event": "evaluation", "step": 1, "top1": 1e999}',
        '{"event": "evaluation", "step": "x", "top1": 0.1}', '{"event": "evaluation", "step": 3, "top1": 2}',
        "[" * 5000, '{"event": "step", "step"',
    ]  # fmt: skip
    path.write_text(step(1) + "\n".join(damaged) + "\n" + evaluation + step(2) + '{"event": "step", "st')
    found = read_events(path)
    assert [(one.step, one.top1, one.top5) for one in found.evaluations] == [(2, 0.5, None)]
    assert found.last_step is not None and found.last_step["step"] == 2 and found.train_loss == 1.0
    curve = read_curve(path)
    assert curve is not None and curve.steps.tolist() == [1, 2]
    assert np.isnan(curve.gpu_hours).all() and curve.hours.tolist() == [2 / 3600, 4 / 3600]


def test_steps_repeated_after_a_restart_count_once(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"

    def evaluation(at: int, top1: float) -> str:
        return json.dumps({"event": "evaluation", "step": at, "top1": top1, "top5": 1.0}) + "\n"

    first = "".join(step(number, loss=9.0) for number in range(1, 6))
    again = "".join(step(number, loss=1.0) for number in range(3, 5))
    start = '{"event": "start", "step": 2, "world_size": 4}\n'
    path.write_text(
        first
        + evaluation(2, 0.2)
        + evaluation(4, 0.9)
        + evaluation(5, 0.95)
        + start
        + again
        + evaluation(4, 0.4)
    )
    found = read_events(path)
    assert [(one.step, one.top1) for one in found.evaluations] == [(2, 0.2), (4, 0.4)]
    assert found.started == {"event": "start", "step": 2, "world_size": 4}
    assert found.train_loss == 5.0 and found.last_step is not None and found.last_step["step"] == 4
    curve = read_curve(path)
    assert curve is not None
    assert (curve.steps.tolist(), curve.loss.tolist()) == ([1, 2, 3, 4], [9.0, 9.0, 1.0, 1.0])


def test_a_long_run_is_thinned_evenly_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with open(path, "w") as file:
        file.writelines(step(number, loss=float(number), padding="x" * 200) for number in range(1, 100_001))
    tracemalloc.start()
    curve = read_curve(path, points=100)
    assert read_events(path).last_step == json.loads(step(100_000, 100_000.0, padding="x" * 200))
    assert tracemalloc.get_traced_memory()[1] < 2**24  # the file has 26 MB
    tracemalloc.stop()
    assert curve is not None and 50 <= len(curve.steps) <= 100
    assert set(np.diff(curve.steps)) == {1024} and (curve.loss == curve.steps).all()


def test_hashes_of_batches_by_step(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(step(1, batch_hash="a") + step(2, batch_hash="b") + step(3) + step(2, batch_hash="c"))
    found = batch_hashes(path)
    assert found is not None
    steps, digests = found
    assert steps.tolist() == [1, 2] and len(set(digests.tolist())) == 2
    path.write_text(step(2, batch_hash="c"))
    again = batch_hashes(path)
    assert again is not None and again[1][0] == digests[1]
    path.write_text(step(1))
    assert batch_hashes(path) is None


def test_too_many_evaluations_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_EVALUATIONS", 3)
    path = tmp_path / "events.jsonl"
    path.write_text("".join(f'{{"event": "evaluation", "step": {n}, "top1": 0.1}}\n' for n in range(5)))
    found = read_events(path)
    assert len(found.evaluations) == 3 and found.too_many


def test_a_hash_as_a_run_writes_it_is_its_digest(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    whole = step(7, batch_hash="00000000000000ff", mfu=None)
    cut_off = step(9, batch_hash="00000000000000aa", mfu=None)[:-3]
    nested = '{"event": "step", "old": {"step": 3, "batch_hash": "00000000000000bb"}, "step": 4}\n'
    path.write_text(whole + nested + cut_off)
    found = batch_hashes(path)
    assert found is not None and (found[0].tolist(), found[1].tolist()) == ([7], [255])
