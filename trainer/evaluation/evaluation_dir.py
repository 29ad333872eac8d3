"""The folder of an evaluation: what is done so far, so that it goes on where it was interrupted."""

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

_DIGITS = 12  # of a row in a part's name, so that names stand in order


class EvaluationDir:
    """Scores are kept as parts, each of some rows that follow those of the one before, and each whole.

    So what is done is all rows before `done`, whatever the number of ranks was. bad: videos among them that
    could not be read. Only rank 0 begins one, and reads or writes there.
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
        """Make the folder for this evaluation, or go on with it.

        identity: what it is of, as JSON has it. again: throw away what is there.

        Raises RunError where another evaluation, or a run, is there, OSError where the folder cannot be
        written.
        """
        if RunDir(self.path).events.exists():
            raise RunError(
                f"{self.path} is a run's folder, whose own scores would be replaced: name another with --out"
            )
        if again or not (self._identity.exists() or self.result.exists()):
            self._remove()  # parts of nobody knows what, too: a removal that was interrupted leaves such
        self._parts.mkdir(parents=True, exist_ok=True)
        self._compare(identity)
        write_json(self._identity, identity)
        for leftover in (*self.path.glob(".*.partial"), *self._parts.glob(".*.partial")):
            leftover.unlink()
        self._count()

    def _remove(self) -> None:
        self.result.unlink(missing_ok=True)  # first: without its parts it would be taken for done
        self._identity.unlink(missing_ok=True)
        if self._parts.exists():
            shutil.rmtree(self._parts)

    def _compare(self, identity: dict[str, Any]) -> None:
        try:
            before = json.loads(self._identity.read_text(encoding="utf-8"))
        except FileNotFoundError:
            if not self.result.exists():
                return
            before = {}
        except (ValueError, RecursionError):
            before = {}
        differing = [
            f"{name}: {_short(before.get(name) if isinstance(before, dict) else None)} there, "
            f"{_short(value)} now"
            for name, value in identity.items()
            if not isinstance(before, dict) or before.get(name) != value
        ]
        if differing:
            raise RunError(
                f"{self.path} holds an evaluation of something else ({'; '.join(differing)}): name another "
                "folder with --out, or give --again to throw that one away"
            )

    @property
    def is_finished(self) -> bool:
        """Whether the evaluation came to its end."""
        return self.result.exists()

    def _count(self) -> None:
        """Find what is done. Removes parts that follow a gap, which only a person can have made."""
        self.done = self.bad = 0
        for path in self.parts():
            first, end = _rows_of(path)
            if first != self.done:
                path.unlink()
            else:
                self.done, self.bad = end, self.bad + _nulls(path)

    def parts(self) -> list[Path]:
        """In the order of their rows."""
        return sorted(self._parts.glob("*.parquet"))

    def bad_videos(self) -> Iterator[tuple[int, str, str]]:
        """Row, path and reason of each that could not be read."""
        for path in self.parts():
            if _nulls(path):
                columns = pq.read_table(path, columns=["row", "path", "prediction", "reason"])
                for entry in columns.filter(pc.is_null(columns["prediction"])).to_pylist():
                    yield entry["row"], entry["path"], entry["reason"] or "cannot be read"

    def write(self, rows: pa.Table) -> None:
        """Keep some rows, which follow those that are there. Raises OSError where they find no room."""
        first, end = rows["row"][0].as_py(), rows["row"][-1].as_py() + 1
        path = self._parts / f"{first:0{_DIGITS}d}-{end:0{_DIGITS}d}.parquet"
        classes = rows.schema.field("scores").type.list_size
        with ScoreFile(path, schema(classes)) as file:
            file.write(rows)
        self.done, self.bad = end, self.bad + rows["prediction"].null_count

    def read(self, part: Path) -> Iterator[pa.Table]:
        """The rows of a part. Raises RunError for one that is damaged."""
        try:
            yield from row_groups(part)
        except (OSError, pa.ArrowException) as error:
            raise RunError(
                f"{part} is damaged ({error}): remove it, and start again to have its videos evaluated"
            ) from error

    def remove_parts(self) -> None:
        """Remove the parts, once all that came of them is written."""
        shutil.rmtree(self._parts, ignore_errors=True)


def _rows_of(part: Path) -> tuple[int, int]:
    first, _, end = part.stem.partition("-")
    return int(first), int(end)


def _nulls(part: Path) -> int:
    try:
        found = pq.read_metadata(part)
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"{part} is damaged ({error}): remove it, and start again") from error
    column = found.schema.names.index("prediction")
    groups = range(found.num_row_groups)
    return sum(found.row_group(group).column(column).statistics.null_count for group in groups)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 20 else f"{text[:13]}...{text[-1]}"
