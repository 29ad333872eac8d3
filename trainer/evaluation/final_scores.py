"""Writes the scores of a run's last evaluation to its run directory."""

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import torch.distributed as dist
from torch import Tensor

from pipelines.loader import ClipBatch, ClipLoader
from trainer.evaluation.scores import ScoreFile, ScoreGatherer, ScoreMetadata, schema
from trainer.system.files import BestEffort


@dataclass
class FinalScoreWriter:
    """Writes `scores.parquet` during an evaluation: gathers the scores of all ranks, rank 0 writes.

    Call `begin`, `add` for each batch, and `close`; all are collective. If the disk is full, the file is
    missing and the run continues.
    """

    path: Path
    best_effort: BestEffort
    """Of the run directory."""
    loader: ClipLoader
    """Of the validation videos."""
    gatherer: ScoreGatherer
    about: ScoreMetadata
    """Of the file; `begin` adds the step."""
    _file: ScoreFile | None = None  # on rank 0, until an error

    def begin(self, step: int) -> None:
        if dist.get_rank() == 0:
            about = replace(self.about, step=step)
            with self.best_effort(self.path):
                self._file = ScoreFile(self.path, schema(self.gatherer.classes, about))

    def add(self, batch: ClipBatch, scores: Tensor) -> None:
        """Add a batch and its scores, (B, K)."""
        self.gatherer.add(batch, scores)
        if self.gatherer.is_due:
            self._write(self.gatherer.gather(self.loader.bad_samples))

    def close(self, *, whole: bool) -> None:
        """Publish the file if all videos were evaluated (`whole`); otherwise keep the earlier file."""
        if whole:
            self._write(self.gatherer.gather(self.loader.bad_samples))
        file, self._file = self._file, None
        if file is not None:
            with self.best_effort(self.path):
                file.close(whole=whole)
        elif whole and dist.get_rank() == 0:  # an earlier file would be mistaken for this evaluation's
            with self.best_effort(self.path):
                self.path.unlink(missing_ok=True)

    def _write(self, rows: pa.Table | None) -> None:
        if self._file is None or rows is None:
            return
        with self.best_effort(self.path):
            self._file.write(rows)
            return
        with suppress(OSError):
            self._file.close(whole=False)
        self._file = None
