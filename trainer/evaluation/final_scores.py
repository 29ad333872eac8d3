"""The scores of a run's last evaluation, written into its folder."""

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
    """Writes `scores.parquet` while an evaluation goes on: all ranks hand in, rank 0 writes.

    `begin`, then `keep` each batch, then `end`, all of them collective. A disk without room costs the file,
    not the run.
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
            path: of the file.
            best_effort: of the run's folder.
            loader: of the validation videos.
            dataset: those videos.
            about: what the scores are of; the step is not known yet.
            batch: videos of a rank and forward pass.
            classes: scores of a video.
        """
        self._path = path
        self._telling = best_effort
        self._loader = loader
        self._about = about
        self._classes = classes
        self._gatherer = ScoreGatherer(dataset, batch, classes)
        self._file: ScoreFile | None = None  # on rank 0, while nothing went wrong

    def begin(self, step: int) -> None:
        if dist.get_rank() == 0:
            about = dataclasses.replace(self._about, step=step)
            with self._telling(self._path):
                self._file = ScoreFile(self._path, schema(self._classes, about))

    def add(self, batch: ClipBatch, scores: Tensor) -> None:
        """Hand in a batch and its scores, (B, K)."""
        self._gatherer.add(batch, scores)
        if self._gatherer.is_due:
            self._write(self._gatherer.gather(self._loader.bad_samples))

    def close(self, *, whole: bool) -> None:
        """Put the file in its place where all videos were seen; otherwise the one from before stays."""
        if whole:
            self._write(self._gatherer.gather(self._loader.bad_samples))
        file, self._file = self._file, None
        if file is not None:
            with self._telling(self._path):
                file.close(whole=whole)
        elif whole and dist.get_rank() == 0:  # those of an earlier end would be taken for these
            with self._telling(self._path):
                self._path.unlink(missing_ok=True)

    def _write(self, rows: pa.Table | None) -> None:
        if self._file is None or rows is None:
            return
        written = False
        with self._telling(self._path):
            self._file.write(rows)
            written = True
        if not written:
            with suppress(OSError):
                self._file.close(whole=False)
            self._file = None
