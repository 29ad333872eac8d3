"""Where the record batches of an Arrow file are, and whether one is compressed, without trusting the file.

PyArrow gives no access to the footer, reads a batch's place only when the batch is read, and decompresses
without a limit: a few compressed kilobytes can become many gigabytes. So this module parses the FlatBuffers
itself (https://arrow.apache.org/docs/format/Columnar.html, File.fbs and Message.fbs), with every position
checked against the size of the file.
"""

import struct

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

BLOCK = np.dtype([("offset", "<i8"), ("metadata", "<i4"), ("padding", "<i4"), ("body", "<i8")])
"""A record batch: its first byte, and the bytes of its message and of its buffers."""

_RECORD_BATCHES = 3  # field of Footer: a vector of Block
_HEADER = 2  # field of Message: a table, here RecordBatch
_COMPRESSION = 3  # field of RecordBatch, absent where the batch is not compressed
_MAGIC = 8  # bytes: the magic number at the head of the file, padded
_TAIL = 10  # bytes: length of the footer (int32), magic number


def read_blocks(file: pa.NativeFile) -> NDArray[np.void]:
    """The places of the record batches, as an array of `BLOCK`: one after another, between head and footer.

    Raises:
        ValueError: the footer is damaged, or a batch is outside the file or overlaps another one.
    """
    try:
        end = file.size() - _TAIL
        (length,) = struct.unpack("<i", _read(file, 4, end))
        footer = _read(file, length, end - length)
        place = _field(footer, _target(footer, 0), _RECORD_BATCHES)
        if not place:
            return np.zeros(0, BLOCK)
        vector = _target(footer, place)
        (count,) = struct.unpack_from("<I", footer, vector)
        if count * BLOCK.itemsize > len(footer):
            raise ValueError(f"its footer has {length} bytes, too few for {count} batches")
        blocks = np.frombuffer(footer, BLOCK, count, vector + 4)
    except (struct.error, OverflowError) as error:
        raise ValueError("its footer is damaged") from error
    begins, metadata, body = blocks["offset"], blocks["metadata"].astype(np.int64), blocks["body"]
    # Each is bounded before they are added, so that no sum overflows.
    inside = (begins >= _MAGIC) & (begins <= end) & (metadata > 0) & (body >= 0) & (body <= end)
    ends = np.where(inside, begins + metadata + np.where(inside, body, 0), -1)
    limits = np.append(begins[1:], end - length)
    for number in np.flatnonzero(~inside | (ends > limits))[:1].tolist():
        raise ValueError(
            f"its footer places batch {number} at byte {begins[number]}, with {metadata[number]} and "
            f"{body[number]} bytes, outside the file or over another batch"
        )
    return blocks


def is_compressed(file: pa.NativeFile, block: np.void) -> bool:
    """Whether the record batch at `block` of an Arrow file is compressed.

    Raises:
        ValueError: the batch's message is damaged.
    """
    try:
        message = _read(file, int(block["metadata"]), int(block["offset"]))
        begin = 8 if message.startswith(b"\xff\xff\xff\xff") else 4  # after an optional marker and the length
        batch = _target(message, _field(message, _target(message, begin), _HEADER))
        return _field(message, batch, _COMPRESSION) != 0
    except (struct.error, OverflowError) as error:
        raise ValueError("a batch's header is damaged") from error


def _read(file: pa.NativeFile, length: int, offset: int) -> bytes:
    if not (length >= 0 and 0 <= offset <= file.size() - length):
        raise ValueError("its footer points outside the file")
    return bytes(file.read_at(length, offset))


def _target(data: bytes, position: int) -> int:
    """The position that the relative offset at `position` points to."""
    return int(position + struct.unpack_from("<I", data, position)[0])


def _field(data: bytes, table: int, number: int) -> int:
    """The position of field `number` of the FlatBuffers table at `table`; 0 if the table does not have it."""
    fields = table - struct.unpack_from("<i", data, table)[0]
    (size,) = struct.unpack_from("<H", data, fields)
    if 4 + 2 * number + 2 > size:
        return 0
    (offset,) = struct.unpack_from("<H", data, fields + 4 + 2 * number)
    return int(table + offset) if offset else 0
