"""A run for comparison, read from its directory or from MLflow."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

FINGERPRINTS = ("train_fingerprint", "val_fingerprint")


@dataclass(frozen=True)
class RecordedEvaluation:
    """Accuracies after `step` steps, 0..1, and the validation loss where it was recorded."""

    step: int
    top1: float
    top5: float | None
    loss: float | None = None


@dataclass(frozen=True)
class Curve:
    """A run's training loss, thinned: (N,) arrays, NaN where a value was not recorded."""

    steps: np.ndarray
    loss: np.ndarray
    hours: np.ndarray
    gpu_hours: np.ndarray


@dataclass
class ComparedRun:
    """One run. Missing values are empty or None; `notes` has the reasons for unexpected ones."""

    source: str
    """A folder, or MLflow's id of a run."""
    name: str
    status: str
    """`finished`, `running`, `stopped`, `failed` and the other states of `launch/status.py`."""
    recipe: dict[str, str] = field(default_factory=dict)
    """Every field by its dotted name, as text."""
    data: dict[str, str] = field(default_factory=dict)
    """Fingerprints of the manifests, by name (`FINGERPRINTS`)."""
    evaluations: list[RecordedEvaluation] = field(default_factory=list)
    """By step."""
    results: dict[str, float] = field(default_factory=dict)
    """`step`, `total_steps`, `train_loss`, `clips_per_second`, `data_wait_share`, `mfu`, `hours`,
    `gpu_hours`, `quarantined`."""
    notes: list[str] = field(default_factory=list)
    parent: str | None = None
    """MLflow's id of the parent run."""
    read_curve: Callable[[], Curve | None] = lambda: None
    find_scores: Callable[[], Path | None] = lambda: None
    """The file of scores per video; None where there is none."""
    folder: Path | None = None

    @property
    def best(self) -> RecordedEvaluation | None:
        return max(self.evaluations, key=lambda found: found.top1, default=None)

    @property
    def best_top5(self) -> float | None:
        return max((found.top5 for found in self.evaluations if found.top5 is not None), default=None)

    @property
    def last(self) -> RecordedEvaluation | None:
        return self.evaluations[-1] if self.evaluations else None

    @property
    def global_batch(self) -> int | None:
        text = self.recipe.get("optimisation.global_batch", "")
        return int(text) if text.isdecimal() and len(text) < 12 else None
