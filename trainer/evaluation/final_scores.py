"""Writes the scores of a run's last evaluation to its run directory."""

import dataclasses
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import torch.distributed as dist
from torch import Tensor

from pipelines.dataset.concat import Dataset
from pipelines.loader import ClipBatch, ClipLoader
from trainer.evaluation.scores import ScoreFile, ScoreGatherer, ScoreMetadata, schema
from trainer.system.files import BestEffort


class FinalScoreWriter:
    """Writes `scores.parquet` during an evaluation: gathers the scores of all ranks, rank 0 writes.

    Call `begin`, `add` for each batch, and `close`; all are collective. If the disk is full, the file is
    missing and the run continues.
    """

    def __init__(
        self,
        path: Path,
        best_effort: BestEffort,
        loader: ClipLoader,
        dataset: Dataset,
        about: ScoreMetadata,
        *,
        batch: int,
        classes: int,
    ) -> None:
        """
        Args:
            path: the file.
            best_effort: of the run directory.
            loader: loader of the validation videos.
            dataset: the validation videos.
            about: metadata of the file; `begin` adds the step.
            batch: videos per rank and forward pass.
            classes: scores per video.
        """
        self._path = path
        self._best_effort = best_effort
        self._loader = loader
        self._about = about
        self._classes = classes
        self._gatherer = ScoreGatherer(dataset, batch, classes)
        self._file: ScoreFile | None = None  # on rank 0, until an error

    def begin(self, step: int) -> None:
        if dist.get_rank() == 0:
            about = dataclasses.replace(self._about, step=step)
            with self._best_effort(self._path):
                self._file = ScoreFile(self._path, schema(self._classes, about))

    def add(self, batch: ClipBatch, scores: Tensor) -> None:
        """Add a batch and its scores, (B, K)."""
        self._gatherer.add(batch, scores)
        if self._gatherer.is_due:
            self._write(self._gatherer.gather(self._loader.bad_samples))

    def close(self, *, whole: bool) -> None:
        """Publish the file if all videos were evaluated (`whole`); otherwise keep the earlier file."""
        if whole:
            self._write(self._gatherer.gather(self._loader.bad_samples))
        file, self._file = self._file, None
        if file is not None:
            with self._best_effort(self._path):
                file.close(whole=whole)
        elif whole and dist.get_rank() == 0:  # an earlier file would be mistaken for this evaluation's
            with self._best_effort(self._path):
                self._path.unlink(missing_ok=True)

    def _write(self, rows: pa.Table | None) -> None:
        if self._file is None or rows is None:
            return
        written = False
        with self._best_effort(self._path):
            self._file.write(rows)
            written = True
        if not written:
            with suppress(OSError):
                self._file.close(whole=False)
            self._file = None
