"""File names of any bytes: stored in a manifest, and printed."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines.dataset.manifest import ManifestRow, decode_path, encode_path, write_manifest
from pipelines.errors import VideoError
from pipelines.formatting import printable

LATIN = Path(os.fsdecode(b"/videos/caf\xe9/na\xefve \xc3\xa9.mp4"))


def test_every_name_is_decoded_unchanged_and_encoded_as_utf_8():
    rng = np.random.default_rng(0)
    parts = [bytes([byte]) for byte in range(1, 256)] + ["é".encode(), "\u2028".encode(), "😀".encode()]
    names = [b"".join(rng.choice(parts, 12)) for _ in range(2000)]
    names += [b"\xed\xb3\xa9", b"\xf4\x90\x80\x80\xc3"]  # a surrogate's bytes, and a number beyond Unicode
    for name in names:
        path = Path(os.fsdecode(name))
        text = encode_path(path)
        text.encode()
        assert decode_path(text) == path
        assert os.fsencode(decode_path(text)) == os.fsencode(path)
        assert printable(path).encode().decode().splitlines() == [printable(path)]


def test_a_path_in_utf_8_is_stored_unchanged():
    for name in ("videos/клип 1.mp4", "/a\nb\\c\t😀.mp4", "Cafe\u0301/é.mp4", "-dash"):
        assert encode_path(Path(name)) == name
        assert decode_path(name) == Path(name)


def test_a_byte_that_is_not_utf_8_is_stored_as_nul_and_digits():
    assert encode_path(LATIN) == "/videos/caf\0e9/na\0efve é.mp4"


@pytest.mark.parametrize("text", ["a\0", "a\0b", "\0\0e9", "a\x0041.mp4", "a\x002f.mp4", "a\x0000b", "a\0E9"])
def test_any_other_nul_is_a_video_error(text):
    with pytest.raises(VideoError, match="NUL"):
        decode_path(text)


def test_unprintable_characters_are_escaped_as_bash_reads_them(tmp_path):
    assert printable(LATIN) == r"/videos/caf\xe9/na\xefve é.mp4"
    assert printable("a\nb\r\t\\ \x1b[31m \x85\u2028\ud800") == r"a\nb\r\t\\ \x1b[31m \u0085\u2028\ud800"
    assert printable(Path("клип 1's.mp4")) == "клип 1's.mp4"
    odd = tmp_path / os.fsdecode(b"\xe9\n\\\x1b\xc2\x85\xe2\x80\xa8.mp4")
    odd.write_text("found")
    shown = subprocess.run(
        ["bash", "-c", f"cat $'{printable(odd)}'"],
        capture_output=True,
        check=True,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )
    assert shown.stdout == b"found"


def test_a_manifest_with_file_names_that_are_not_utf_8(tmp_path):
    file = tmp_path / os.fsdecode(b"caf\xe9.mp4")
    file.touch()
    row = ManifestRow(encode_path(Path(file.name)), 0, 0, 0, 1, 25.0, 4, 4, "h264")
    manifest = write_manifest(tmp_path / "m.arrow", [row], ["only"])
    manifest.verify()
    assert manifest.row(0).path == "caf\0e9.mp4"
    assert manifest.absolute_path(manifest.row(0)) == file
    assert manifest.absolute_path(manifest.row(0)).is_file()


def test_paths_are_bytes_whatever_the_locale():
    program = """
import os, sys
from pathlib import Path
from pipelines.dataset.paths import decode_path, encode_path
from pipelines.formatting import printable
assert sys.getfilesystemencoding() == "ascii", sys.getfilesystemencoding()
path = Path(os.fsdecode(b"caf\\xe9 \\xc3\\xa9"))
assert encode_path(path) == "caf\\0e9 \\xe9"
assert decode_path("caf\\0e9 \\xe9") == path
assert printable(path) == "caf\\\\xe9 \\xe9"
"""
    subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", program],
        env={**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"},
        check=True,
    )
