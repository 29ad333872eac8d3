"""Ranks that hang end a test, and say where; no later one waits for as long again."""

import os
import signal
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest

from tests.trainer import ranks
from tests.trainer.ranks import RankError, Ranks, begin, prepared_context


def where_it_hangs() -> None:
    time.sleep(1000)


def is_ready() -> bool:
    return True


def test_a_rank_that_hangs_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_given_up", "")
    with Ranks(1) as one:
        assert one.run(is_ready) == [True]
        (process,) = one.processes
        monkeypatch.setattr(ranks, "PATIENCE", 1.0)
        with pytest.raises(RankError, match=r"(?s)ranks \[0\] came to no end .* in where_it_hangs\n"):
            one.run(where_it_hangs)
        assert not process.is_alive()
        with pytest.raises(RankError, match="an earlier test hung: ranks"):
            one.run(is_ready)


def test_the_process_that_is_copied_has_one_thread() -> None:
    with Ranks(1) as one:
        assert one.run(is_ready) == [True]  # all is imported
        server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
        threads = [file.read_text().strip() for file in Path(f"/proc/{server}/task").glob("*/comm")]
        assert len(threads) == 1, threads


def test_a_server_that_is_stuck_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with Ranks(1) as one:
        assert one.run(is_ready) == [True]
    monkeypatch.setattr(ranks, "_given_up", "")
    monkeypatch.setattr(ranks, "PATIENCE", 2.0)
    context = prepared_context()
    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    os.kill(server, signal.SIGSTOP)
    with pytest.raises(RankError, match="no process was forked within 2 s"):
        begin(context.Process(target=is_ready, daemon=True))
    monkeypatch.undo()
    with Ranks(1) as one:  # by a new server
        assert one.run(is_ready) == [True]
