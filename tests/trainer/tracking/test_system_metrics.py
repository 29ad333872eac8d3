"""Hardware metrics of the nodes of a run."""

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from trainer.tracking import system_metrics
from trainer.tracking.system_metrics import NodeMonitor


def test_rank_0_reports_the_samples_of_all_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_metrics, "SECONDS", 0.02)
    monkeypatch.setattr(system_metrics, "VALUES_PER_SECOND", 1000.0)
    (tmp_path / "nodes").mkdir()
    (tmp_path / "nodes" / "node-00002.json").write_text('{"time": "never"}')
    complete = threading.Event()
    seen: dict[str, float] = {}

    def report(values: Mapping[str, float]) -> None:
        seen.update(values)
        if "system/cpu_utilization_percentage_node1" in seen:
            complete.set()

    with ExitStack() as stack:
        for node in (1, 0):
            stack.enter_context(
                NodeMonitor(tmp_path, node=node, nodes=3, gpus=[], report=None if node else report)
            )
        assert complete.wait(60)
    assert {key.rpartition("_")[2] for key in seen} == {"node0", "node1"}
    assert 0 < seen["system/system_memory_usage_percentage_node1"] <= 100
    count = len(seen)
    time.sleep(0.1)
    assert len(seen) == count  # the threads have ended


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_failing_monitor_logs_once_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(system_metrics, "SECONDS", 0.02)
    (tmp_path / "nodes").write_text("a file in the folder's place")
    monkeypatch.setattr(system_metrics, "VALUES_PER_SECOND", 1000.0)
    node = tmp_path / "nodes" / "node-00001.json"
    with NodeMonitor(tmp_path, node=1, nodes=2, gpus=[], report=None):
        wait_for(lambda: bool(caplog.records))
        time.sleep(0.1)
        assert ["node 1" in record.getMessage() for record in caplog.records] == [True]
        (tmp_path / "nodes").unlink()
        wait_for(node.exists)
