"""`scores.parquet`: the scores of each video of a manifest, one row per video in the manifest's order.

Columns: `row` int64, `path`, `label` int32, `prediction` int32, `correct_top5` bool, `scores` fixed_size_list
of float32, the mean softmax of the video's views. For an unreadable video `prediction`, `correct_top5` and
each of the `scores` are null; the list itself is not, because PyArrow cannot read a null list of fixed size.
`label` is null if the row has none. The schema's metadata under `uniformerv2` is JSON, see `ScoreMetadata`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.atomic_file import partial_path, rename_partial
from pipelines.bad_samples import BadSample, BadSamples
from pipelines.dataset.concat import Dataset
from pipelines.loader import ClipBatch
from trainer.evaluation.metrics import outcomes_of

METADATA = b"uniformerv2"

ROUND_BYTES = 2**25
"""Largest size of the scores that rank 0 gathers at once; at least one batch of each rank."""

ROUND_ROWS = 2**16
"""The same limit in videos."""


@dataclass(frozen=True)
class ScoreMetadata:
    """Metadata of a score file.

    manifest: file name of the manifest.
    fingerprint: of the manifest's content.
    class_names: of the manifest, by label.
    clips, crops: views per video.
    step: training step of the weights; None if unknown.
    source: file or folder of the weights.
    """

    manifest: str
    fingerprint: str
    class_names: tuple[str, ...]
    clips: int
    crops: int
    step: int | None
    source: str


def schema(classes: int, about: ScoreMetadata | None = None) -> pa.Schema:
    """The schema of the file; without `about` that of a part.

    A part has a column `reason`: why a video is unreadable. classes: scores per video.
    """
    fields = [
        ("row", pa.int64()),
        ("path", pa.string()),
        ("label", pa.int32()),
        ("prediction", pa.int32()),
        ("correct_top5", pa.bool_()),
        ("scores", pa.list_(pa.float32(), classes)),
    ]
    if about is None:
        return pa.schema([*fields, ("reason", pa.string())])
    return pa.schema(fields, {METADATA: json.dumps(asdict(about), ensure_ascii=False).encode()})


def most_rows(classes: int) -> int:
    """Number of rows that are gathered and written at once."""
    return max(1, min(ROUND_ROWS, ROUND_BYTES // (4 * classes)))


class ScoreFile:
    """Writes a score file atomically; a context manager. Memory holds at most one row group."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        """Raises OSError if the file cannot be written."""
        self._path = path
        self._partial = partial_path(path)
        self._schema = schema
        self._waiting: list[pa.Table] = []
        # Scores hardly repeat. Splitting them by byte saves 15 % of the size and time.
        self._writer = pq.ParquetWriter(
            self._partial,
            schema,
            compression="zstd",
            use_dictionary=["path"],
            use_byte_stream_split=["scores.list.element"],
        )

    def write(self, table: pa.Table) -> None:
        """Append rows without columns that the schema lacks. Raises OSError."""
        self._waiting.append(table.select(self._schema.names).cast(self._schema))
        rows = sum(map(len, self._waiting))
        if rows >= most_rows(self._schema.field("scores").type.list_size):
            self._write_waiting()

    def _write_waiting(self) -> None:
        if self._waiting:
            rows = pa.concat_tables(self._waiting)
            self._waiting = []
            self._writer.write_table(rows, row_group_size=len(rows))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close(whole=error is None)

    def close(self, *, whole: bool) -> None:
        """Publish the file if it is complete (`whole`), else delete it. Raises OSError."""
        try:
            if whole:
                self._write_waiting()
            self._writer.close()
            if whole:
                rename_partial(self._partial, self._path, sync=True)
        finally:
            self._partial.unlink(missing_ok=True)


class ScoreGatherer:
    """Gathers the ranks' scores on rank 0, several batches at a time, in the order of the dataset's rows.

    Every rank adds the batches that `ViewSampler` assigns to it. first: rows before it are omitted.
    """

    def __init__(self, dataset: Dataset, batch: int, classes: int, first: int = 0) -> None:
        self._dataset = dataset
        self._first = first
        self.classes = classes
        self._round_batches = max(1, most_rows(classes) // (batch * dist.get_world_size()))
        self._kept: list[tuple[Tensor, Tensor]] = []

    @property
    def is_due(self) -> bool:
        """Whether the batches must be gathered; the same on all ranks."""
        return len(self._kept) >= self._round_batches

    def add(self, batch: ClipBatch, scores: Tensor) -> None:
        """Add a batch and its scores, (B, K), which stay on the device."""
        self._kept.append((torch.stack([batch.ids, batch.labels, batch.valid.long()], dim=1), scores))

    def gather(self, bad_samples: BadSamples) -> pa.Table | None:
        """The rows of all ranks since the last call, on rank 0; None on the others. Collective.

        bad_samples: of the loader; they have the reasons why videos are bad, and stay as they are.
        """
        if not self._kept:
            return None
        numbers = torch.cat([numbers for numbers, _ in self._kept]).cpu()  # N 3
        scores = torch.cat([scores for _, scores in self._kept]).float().cpu()  # N K
        self._kept = []
        there = numbers[:, 0] >= self._first  # not the padding of the last batch
        own = self._table(numbers[there], scores[there], bad_samples.videos)
        tables: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(own, tables)
        return None if tables is None else pa.concat_tables(tables).sort_by("row")

    def _table(self, numbers: Tensor, scores: Tensor, defects: Mapping[int, BadSample]) -> pa.Table:
        rows, labels, valid = numbers.unbind(dim=1)
        outcomes = outcomes_of(scores, labels)
        bad = ~valid.bool().numpy()
        values = pa.array(scores.flatten().numpy(), mask=np.repeat(bad, self.classes))
        samples = rows.tolist()
        columns = {
            "row": rows.numpy(),
            "path": [self._dataset.printable_path(row) for row in samples],
            "label": pa.array(labels.int().numpy(), mask=(labels < 0).numpy()),
            "prediction": pa.array(outcomes.predictions.int().numpy(), mask=bad),
            "correct_top5": pa.array(outcomes.in_top5.numpy(), mask=bad),
            "scores": pa.FixedSizeListArray.from_arrays(values, self.classes),
            "reason": [
                defects[row].reason if is_bad and row in defects else None
                for row, is_bad in zip(samples, bad, strict=True)
            ],
        }
        return pa.table(columns, schema=schema(self.classes))


def tensors_of(table: pa.Table) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (N, K) float32, labels (N,) int64 and validity (N,) bool of stored rows.

    A bad video's scores are 0; a missing label is -1.
    """
    rows = table.combine_chunks().to_batches()[0]
    scores = rows.column("scores")
    classes = scores.type.list_size
    values = scores.flatten().fill_null(0.0).to_numpy(zero_copy_only=False).reshape(-1, classes)
    labels = rows.column("label").fill_null(-1).to_numpy(zero_copy_only=False)
    valid = rows.column("prediction").is_valid().to_numpy(zero_copy_only=False)
    return (
        torch.from_numpy(np.array(values)),
        torch.from_numpy(labels.astype(np.int64)),
        torch.from_numpy(np.array(valid)),
    )


def row_groups(path: Path) -> Iterator[pa.Table]:
    """Yields the row groups of a score file, one in memory at a time."""
    with pq.ParquetFile(path) as file:
        for number in range(file.num_row_groups):
            yield file.read_row_group(number)
