"""Manifests that the program would not write, and a process of its own that reads them."""

import io
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import pyarrow as pa

from pipelines.dataset.fingerprint import Fingerprint


def parts(path: Path) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    """The schema, with its metadata, and the record batches of a manifest."""
    with pa.ipc.open_file(io.BytesIO(path.read_bytes())) as reader:
        return reader.schema, [reader.get_batch(number) for number in range(reader.num_record_batches)]


def write_parts(path: Path, schema: pa.Schema, batches: list[pa.RecordBatch], **options: Any) -> None:
    """Write them as they are, but for the batches' metadata, which are the schema's."""
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for batch in batches:
            writer.write_batch(batch.replace_schema_metadata(schema.metadata))
    partial = path.with_suffix(".partial")
    partial.write_bytes(sink.getvalue())
    partial.replace(path)  # what is mapped must not be shortened


def change_rows(path: Path, changes: Mapping[int, Mapping[str, Any]]) -> None:
    """Give rows of a manifest other values, whatever they are; its fingerprint is that of the new content."""
    schema, batches = parts(path)
    digest = Fingerprint(schema.names)
    first = 0
    for number, batch in enumerate(batches):
        columns = batch.to_pydict()
        for index in range(first, first + batch.num_rows):
            for name, value in changes.get(index, {}).items():
                columns[name][index - first] = value
        first += batch.num_rows
        batches[number] = pa.RecordBatch.from_pydict(columns, schema=schema)
        digest.update(batches[number])
    names = pa.ipc.open_file(io.BytesIO(path.read_bytes())).schema.metadata[b"class_names"]
    fingerprint = digest.hexdigest(json.loads(names))
    write_parts(path, schema.with_metadata({**schema.metadata, b"fingerprint": fingerprint}), batches)


def change_header(path: Path, **values: str | bytes | None) -> None:
    """Give a manifest other metadata; None takes a value away."""
    schema, batches = parts(path)
    metadata = {**schema.metadata, **{name.encode(): value for name, value in values.items()}}
    kept = {name: value for name, value in metadata.items() if value is not None}
    write_parts(path, schema.with_metadata(kept), batches)


# For each path on standard input a line on what came of reading all of it. The first sum is of the weights
# drawn; what is not a DataError ends the line's first word.
READER = """
import sys, traceback
from pathlib import Path
from pipelines.errors import DataError, VideoError
from pipelines.dataset.manifest import Manifest

def use(path):
    try:
        manifest = Manifest.open(path)
    except DataError as error:
        return f"refused: {error}"
    wrong, damaged = {}, 0
    for index in range(min(len(manifest), 1000)):
        try:
            row = manifest.row(index)
            manifest.absolute_path(row)
            assert 0 <= row.label < len(manifest.class_names)
            assert row.frames > 0 < row.width and row.height > 0
        except VideoError as error:
            wrong[index] = str(error)
            manifest.printable_path(index).encode()
        except DataError:
            damaged += 1
    for number in range(20 * manifest.weighted):
        try:
            index = manifest.row_at_weight(manifest.total_weight * number / 20)
            assert 0 <= index < len(manifest)
        except DataError:
            damaged += 1
    if not damaged:
        assert dict(manifest.wrong_rows()) == wrong, (dict(manifest.wrong_rows()), wrong)
    try:
        manifest.verify()
    except DataError as error:
        return f"damaged: {error}"
    assert not wrong and not damaged
    return "read"

for line in sys.stdin:
    try:
        result = use(Path(line.rstrip("\\n")))
        result.encode()
    except Exception:
        result = "unforeseen: " + traceback.format_exc()
    print(result.replace("\\n", " "), flush=True)
"""


class ManifestReader:
    """A process that reads one manifest after another: `read` returns the result."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def read(self, path: Path) -> str:
        """`read`, or `refused:` or `damaged:` with the message.

        Raises AssertionError where the process died, or something else than a DataError came up.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        print(path, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        assert line, f"the process that reads died: {self._process.wait()}"
        assert not line.startswith("unforeseen"), line
        return line.rstrip("\n")
