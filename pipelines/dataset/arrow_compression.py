"""Whether a record batch of an Arrow file is compressed, read from its header without decompressing it.

A few compressed kilobytes can become many gigabytes, and PyArrow decompresses without a limit. PyArrow does
not give access to the batch headers, so this module parses the two FlatBuffers that hold them: the file's
footer and the batch's message (https://arrow.apache.org/docs/format/Columnar.html, File.fbs and Message.fbs).
"""

import struct

import pyarrow as pa

_RECORD_BATCHES = 3  # field of Footer: a vector of Block
_HEADER = 2  # field of Message: a table, here RecordBatch
_COMPRESSION = 3  # field of RecordBatch, absent where the batch is not compressed
_BLOCK = 24  # bytes: offset (int64), length of the metadata (int32, padded), length of the body (int64)
_TAIL = 10  # bytes: length of the footer (int32), magic number


def is_compressed(file: pa.NativeFile, number: int) -> bool:
    """Whether the record batch `number` of an Arrow file is compressed.

    Raises:
        ValueError: the footer or the batch's message is damaged.
    """
    try:
        end = file.size() - _TAIL
        (length,) = struct.unpack("<i", _read(file, 4, end))
        footer = _read(file, length, end - length)
        blocks = _target(footer, _field(footer, _target(footer, 0), _RECORD_BATCHES))
        offset, length = struct.unpack_from("<qi", footer, blocks + 4 + _BLOCK * number)
        message = _read(file, length, offset)
        begin = 8 if message.startswith(b"\xff\xff\xff\xff") else 4  # after an optional marker and the length
        batch = _target(message, _field(message, _target(message, begin), _HEADER))
        return _field(message, batch, _COMPRESSION) != 0
    except (struct.error, OverflowError) as error:
        raise ValueError("its footer or a batch's header is damaged") from error


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
