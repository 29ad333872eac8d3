"""Manifests that the program would not write, and a process of its own that reads them in every way."""

import io
import json
import random
import struct
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


_NUMBERS = (0, 1, -1, 2, 3, 7, 8, 16, 64, 255, 2**15, 2**31 - 1, -(2**31), 2**40, 2**62, 2**63 - 8, -(2**63))


def mutant(whole: bytes, chance: random.Random) -> bytes:
    """An Arrow file, damaged in one to three places: half of them in the footer, most others in the messages
    of the batches, where offsets and lengths are. Same arguments, same bytes.
    """
    data = bytearray(whole)
    (footer,) = struct.unpack("<i", data[-10:-6])
    first = len(data) - 10 - footer  # of the footer
    messages = [place for place in range(0, first, 8) if data[place : place + 4] == b"\xff\xff\xff\xff"]
    for _ in range(chance.choice((1, 1, 2, 3))):
        where, how = chance.random(), chance.random()
        if where < 0.5:
            place = chance.randrange(first, len(data))
        elif where < 0.8:
            place = min(chance.choice(messages) + chance.randrange(600), len(data) - 1)
        else:
            place = chance.randrange(len(data))
        if how < 0.4:
            data[place] ^= 1 << chance.randrange(8)
        elif how < 0.8:
            width = chance.choice((1, 2, 4, 8))
            place -= place % width
            number = (chance.choice(_NUMBERS) % 256**width).to_bytes(width, "little")
            data[place : place + width] = number[: len(data) - place]
        else:
            copied, count = chance.randrange(len(data)), chance.choice((4, 8, 16, 24))
            data[place : place + count] = data[copied : copied + count][: len(data) - place]
    return bytes(data)


# For each path on standard input a line on what came of reading all of it, as runs and `prepare` do. What is
# not a DataError ends the line's first word.
READER = """
import pickle, sys, traceback
from pathlib import Path
import numpy as np
from pipelines.dali.sample_reader import Decoding, SampleReader, SampleRequest
from pipelines.dataset.concat import Dataset
from pipelines.dataset.manifest import Manifest
from pipelines.dataset.prepare.class_balance import balance
from pipelines.dataset.prepare.verify import verify_manifest
from pipelines.dataset.split_overlap import find_overlap
from pipelines.dataset.spot_check import spot_check
from pipelines.errors import DataError, VideoError

def use(path):
    try:
        manifest = Manifest.open(path)
    except DataError as error:
        return f"refused: {error}"
    wrong, damaged = {}, 0
    samples = SampleReader(Dataset([manifest]), Decoding("pyav"))
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
            continue
        try:
            manifest.packets_at(index)
        except VideoError as error:
            str(error).encode()
        except DataError as error:  # the file of the packet indexes is damaged, which ends a run
            str(error).encode()
            continue
        # A wrong row is a bad sample; the videos of the others do not exist.
        row, reason = samples.row(index)
        assert (row is None) == (index in wrong) and reason == wrong.get(index, "")
        request = SampleRequest(index, row, np.zeros(1, np.int32), None, False, reason)
        assert samples.load(request).reason
    for number in range(20 * manifest.weighted):
        try:
            index = manifest.row_at_weight(manifest.total_weight * number / 20)
            assert 0 <= index < len(manifest)
        except DataError:
            damaged += 1
    if not damaged:
        assert dict(manifest.wrong_rows()) == wrong, (dict(manifest.wrong_rows()), wrong)
    assert pickle.loads(pickle.dumps(manifest)).fingerprint == manifest.fingerprint
    problem = None
    try:
        manifest.verify()
    except DataError as error:
        problem = str(error)
    verified = verify_manifest(manifest)
    verified.summary().encode()
    assert verified.is_wrong >= bool(problem), (problem, verified.summary())
    assert verified.wrong_rows >= len(wrong)
    written = path.with_name("balanced.arrow")
    for read in (
        lambda: find_overlap(samples.dataset, samples.dataset),
        lambda: spot_check(manifest),
        lambda: balance(path, written, 0.5),
    ):
        try:
            read()
        except DataError as error:
            str(error).encode()
    if problem is not None:
        return f"damaged: {problem}"
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
