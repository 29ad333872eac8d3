"""The folder of an evaluation: its identity, the scores so far, and the result."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trainer.errors import RunError
from trainer.evaluation.scores import ScoreFile, row_groups, schema
from trainer.monitoring.run_dir import RunDir
from trainer.system.files import write_json

_DIGITS = 12  # of a row number in a part's name, so that names sort by row


class EvaluationDir:
    """Used on rank 0. The scores are written in parts of consecutive rows, each file atomically.

    An interrupted evaluation continues after its last part, with any number of ranks.

    done: number of rows that are evaluated, all before this row.
    bad: number of unreadable videos among them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.result = path / "evaluation.json"
        self.scores = path / "scores.parquet"
        self._identity = path / "identity.json"
        self._parts = path / "parts"
        self.done = 0
        self.bad = 0

    def prepare(self, identity: dict[str, Any], *, again: bool) -> None:
        """Create the folder, or continue the evaluation in it.

        Args:
            identity: what the scores depend on, as JSON values.
            again: delete an earlier evaluation in the folder.

        Raises:
            RunError: the folder holds another evaluation or a run.
            OSError: the folder cannot be written.
        """
        if RunDir(self.path).events.exists():
            raise RunError(
                f"{self.path} is a run directory, whose scores would be overwritten: name another folder "
                "with --out"
            )
        if again or not (self._identity.exists() or self.result.exists()):
            self._remove()  # also parts without identity, as an interrupted removal leaves them
        self._parts.mkdir(parents=True, exist_ok=True)
        differences = self._differences(identity)
        if differences:
            raise RunError(
                f"{self.path} holds another evaluation ({'; '.join(differences)}): name another folder with "
                "--out, or give --again to delete that evaluation"
            )
        write_json(self._identity, identity)
        for leftover in (*self.path.glob(".*.partial"), *self._parts.glob(".*.partial")):
            leftover.unlink()
        self._count()

    def _remove(self) -> None:
        self.result.unlink(missing_ok=True)  # first: it marks the evaluation as finished
        self._identity.unlink(missing_ok=True)
        if self._parts.exists():
            shutil.rmtree(self._parts)

    def is_finished(self, identity: dict[str, Any]) -> bool:
        """Whether the folder holds the result of this evaluation. Writes nothing. Raises OSError."""
        return self.result.exists() and not self._differences(identity)

    def _differences(self, identity: dict[str, Any]) -> list[str]:
        try:
            stored = json.loads(self._identity.read_text(encoding="utf-8"))
        except FileNotFoundError:
            if not self.result.exists():
                return []
            stored = {}
        except (ValueError, RecursionError):
            stored = {}
        stored = stored if isinstance(stored, dict) else {}
        return [
            f"{name}: {_short(stored.get(name))} there, {_short(value)} now"
            for name, value in identity.items()
            if stored.get(name) != value
        ]

    def _count(self) -> None:
        """Count the rows. Deletes parts after a gap, which arises only if a person deletes a part."""
        self.done = self.bad = 0
        for path in self.parts():
            first, end = map(int, path.stem.split("-"))
            if first != self.done:
                path.unlink()
            else:
                self.done, self.bad = end, self.bad + _nulls(path)

    def parts(self) -> list[Path]:
        """The files of the parts, in row order."""
        return sorted(self._parts.glob("*.parquet"))

    def bad_videos(self) -> Iterator[tuple[int, str, str]]:
        """Yields row, path and reason of each unreadable video."""
        for path in self.parts():
            if _nulls(path):
                columns = pq.read_table(path, columns=["row", "path", "prediction", "reason"])
                for entry in columns.filter(pc.is_null(columns["prediction"])).to_pylist():
                    yield entry["row"], entry["path"], entry["reason"] or "cannot be read"

    def write(self, rows: pa.Table) -> None:
        """Write the next rows as a part. Raises OSError."""
        first, end = rows["row"][0].as_py(), rows["row"][-1].as_py() + 1
        path = self._parts / f"{first:0{_DIGITS}d}-{end:0{_DIGITS}d}.parquet"
        classes = rows.schema.field("scores").type.list_size
        with ScoreFile(path, schema(classes)) as file:
            file.write(rows)
        self.done, self.bad = end, self.bad + rows["prediction"].null_count

    def read(self, part: Path) -> Iterator[pa.Table]:
        """The rows of a part. Raises RunError if it is damaged."""
        try:
            yield from row_groups(part)
        except (OSError, pa.ArrowException) as error:
            raise RunError(
                f"{part} is damaged ({error}): delete it and start again to evaluate its videos"
            ) from error

    def remove_parts(self) -> None:
        """Delete the parts; their rows are in `scores.parquet`."""
        shutil.rmtree(self._parts, ignore_errors=True)


def _nulls(part: Path) -> int:
    try:
        found = pq.read_metadata(part)
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"{part} is damaged ({error}): delete it and start again") from error
    column = found.schema.names.index("prediction")
    groups = range(found.num_row_groups)
    return sum(found.row_group(group).column(column).statistics.null_count for group in groups)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 20 else f"{text[:13]}...{text[-1]}"
