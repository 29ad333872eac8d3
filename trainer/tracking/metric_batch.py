"""Metric values, parameters and tags that wait to go to MLflow in one call."""

from dataclasses import dataclass, field
from typing import Any

from trainer.tracking.outbox import Record
from trainer.tracking.repeated_steps import SentValue

METRICS_PER_CALL = 1000  # MLflow refuses more


@dataclass(frozen=True)
class BatchItem:
    """One metric value, parameter or tag."""

    kind: str
    key: str
    value: Any
    time: int
    step: int | None = None


@dataclass
class RecordBatch:
    """Items that wait for a call, by kind, and the spool offset that the last of them ends at."""

    items: dict[str, list[BatchItem]] = field(
        default_factory=lambda: {"metrics": [], "params": [], "tags": []}
    )
    end: int | None = None

    def add(self, record: Record, without: dict[str, SentValue]) -> None:
        kind = record["kind"]
        for key, value in record["values"].items():
            value = float(value) if kind == "metrics" else str(value)
            if key not in without:
                self.items[kind].append(BatchItem(kind, str(key), value, record["time"], record.get("step")))

    def add_system(self, record: Record, started: int) -> None:
        """Readings of the machines, at a time and no step: MLflow shows them over time.

        started: of the run, milliseconds since 1970; the seconds since then are MLflow's step.
        """
        step = max(0, (record["time"] - started) // 1000)
        self.items["metrics"] += [
            BatchItem("metrics", str(key), float(value), record["time"], step)
            for key, value in record["values"].items()
        ]

    @property
    def full(self) -> bool:
        return len(self.items["metrics"]) >= METRICS_PER_CALL
