"""Tar shards in the layout of WebDataset.

A sample is consecutive members of one name: `000012.cls` (the label), `000012.json` (the row of the source
manifest) and `000012.mp4` (the video, unchanged). The same videos give the same bytes: no member has a time,
an owner or a name of this machine.
"""

import tarfile
from pathlib import Path
from typing import BinaryIO

BLOCK = tarfile.BLOCKSIZE
"""Bytes; members begin at multiples of it."""


def shard_name(number: int) -> str:
    """The file name of a shard: `shard-000012.tar`."""
    return f"shard-{number:06d}.tar"


def sample_name(row: int, rows: int) -> str:
    """The name of a sample's members without extension: the row in the source manifest, of `rows` rows."""
    return f"{row:0{max(6, len(str(rows - 1)))}d}"


def member_extension(path: str) -> str:
    """The extension of a video's member: that of its file in lower case, or `.video` for an unusual one."""
    suffix = Path(path).suffix.lower()
    plain = suffix[1:].isascii() and suffix[1:].isalnum() and len(suffix) <= 9
    return suffix if plain and suffix not in (".cls", ".json") else ".video"


def start_member(file: BinaryIO, name: str, size: int) -> None:
    """Write the header of a member of `size` bytes, which have to follow."""
    member = tarfile.TarInfo(name)
    member.size = size
    file.write(member.tobuf(tarfile.GNU_FORMAT))


def end_member(file: BinaryIO) -> None:
    """Pad the content of a member to whole blocks."""
    file.write(bytes(-file.tell() % BLOCK))


def write_member(file: BinaryIO, name: str, content: bytes) -> None:
    """Write a member."""
    start_member(file, name, len(content))
    file.write(content)
    end_member(file)


def end_archive(file: BinaryIO) -> None:
    """Write the end of an archive."""
    file.write(bytes(2 * BLOCK))
