"""The cache of blocks: its limit, several processes, killed writers and damaged files."""

import errno
import fcntl
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.errors import DataError
from pipelines.storage.block_cache import BLOCK, MINIMUM, BlockCache

WRITER = """
import sys
from pathlib import Path
from pipelines.storage.block_cache import BLOCK, BlockCache
cache, seed = BlockCache(Path(sys.argv[1]), int(sys.argv[2])), int(sys.argv[3])
print("ready", flush=True)
for number in range(10**9 if seed < 0 else 60):
    name = str(number % 40)
    found = cache.get(name)
    assert found is None or found == bytes([int(name)]) * BLOCK, name
    if found is None or number % 3 == seed % 3:
        cache.put(name, bytes([int(name)]) * BLOCK)
"""


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in _files(folder))


def test_blocks_and_least_recently_used_ones_go_first(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "cache", MINIMUM)
    assert cache.get("a") is None
    cache.put("a", b"first")
    assert cache.get("a") == b"first"
    now = time.time()
    for number in range(63):
        cache.put(str(number), bytes(BLOCK - 4))
    for age, name in enumerate(["0", "5", "a", "7"]):
        os.utime(cache._path(name), (now - 1000 + age, now - 1000 + age))
    assert cache.get("5") is not None  # used again
    for number in range(100, 103):
        cache.put(str(number), bytes(BLOCK - 4))
    assert cache.get("5") is not None and cache.get("102") is not None
    assert cache.get("0") is None and cache.get("a") is None
    assert _bytes(tmp_path) <= MINIMUM


def test_a_damaged_block_is_fetched_again(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, MINIMUM)
    for damaged in (b"", b"abc", b"first!!!!"):
        cache.put("a", b"first")
        (file,) = _files(tmp_path)
        file.write_bytes(damaged)
        assert cache.get("a") is None
        assert not _files(tmp_path)


def test_a_large_cache_divides_its_blocks(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 2**30)
    for number in range(64):
        cache.put(str(number), b"x")
    assert len({file.parent for file in _files(tmp_path)}) > 5


def test_another_limit_starts_again(tmp_path: Path) -> None:
    BlockCache(tmp_path, MINIMUM).put("a", bytes(BLOCK))
    others = [
        tmp_path / name for name in ("other file", "blocks-of-wood/00000/video.mp4", "blocks-2/notes.txt")
    ]
    for other in others:
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_text("kept")
    BlockCache(tmp_path, 2**32).put("b", b"content")
    assert len(_files(tmp_path)) == 1 + len(others) and all(other.exists() for other in others)


def test_two_runs_with_other_limits_keep_their_blocks(tmp_path: Path) -> None:
    """Until no process uses a cache: the worker processes of a run have copies of it."""
    small = BlockCache(tmp_path, MINIMUM)
    small.put("a", b"content")
    large = BlockCache(tmp_path, 2**30)
    large.put("a", b"content")
    copy = pickle.loads(pickle.dumps(small))
    del small
    again = BlockCache(tmp_path, 2**32)
    assert copy.get("a") == large.get("a") == b"content" and again.get("a") is None
    del copy
    BlockCache(tmp_path, 2**32)
    assert large.get("a") == b"content" and len(_files(tmp_path)) == 1
    assert BlockCache(tmp_path, MINIMUM).get("a") is None


def test_close_limits_share_blocks_and_the_largest_holds(tmp_path: Path) -> None:
    small, large = BlockCache(tmp_path, MINIMUM), BlockCache(tmp_path, MINIMUM * 5 // 4)
    for number in range(100):
        (large if number % 10 else small).put(str(number), bytes(BLOCK - 4))
        assert _bytes(tmp_path) <= large.limit
    assert _bytes(tmp_path) > small.limit and small.get("99") is not None
    small.put("last", b"content")
    assert _bytes(tmp_path) <= small.limit


def test_small_blocks_count_as_the_disk_counts_them(tmp_path: Path) -> None:
    """A record of an object has some 80 bytes; a million of them would take gigabytes beyond the limit."""
    cache = BlockCache(tmp_path, MINIMUM)
    for number in range(63):
        cache.put(str(number), bytes(BLOCK - 4))
    for number in range(BLOCK // 4096 + 1):
        cache.put(f"{number} object", b"record")
    assert cache.get("0") is None and cache.get("1") is not None


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    """Lustre without the mount option `flock`, NFS without its lock service: caches work, none is deleted."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    small = BlockCache(tmp_path, MINIMUM)
    small.put("a", b"content")
    large = BlockCache(tmp_path, 2**30)
    large.put("a", b"content")
    assert small.get("a") == large.get("a") == BlockCache(tmp_path, MINIMUM).get("a") == b"content"
    (message,) = caplog.messages
    assert os.strerror(code) in message and str(tmp_path) in message


def test_several_processes_and_killed_ones(tmp_path: Path) -> None:
    """Every block that is read has its content, and the limit holds."""
    folder, limit = tmp_path / "cache", MINIMUM // 2 * 3

    def start(seed: int) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", WRITER, str(folder), str(limit), str(seed)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    killed = [start(-1), start(-1)]
    for process in killed:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    for process in killed:
        process.send_signal(signal.SIGKILL)
        process.wait()
    others = [start(seed) for seed in range(2)]
    assert [process.wait() for process in others] == [0, 0]
    assert _bytes(folder) <= limit + 2 * BLOCK  # and the unfinished blocks of the killed
    for file in _files(folder):
        if file.suffix == ".partial":
            os.utime(file, (0, 0))
    cache = BlockCache(folder, limit)
    for number in range(200):
        cache.put(f"new {number}", bytes(BLOCK))
    assert not [file for file in _files(folder) if file.suffix == ".partial"]


def test_a_full_or_missing_disk_costs_no_read(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "cache", MINIMUM)
    (tmp_path / "cache").rename(tmp_path / "gone")
    (tmp_path / "cache").write_text("a file")
    cache.put("a", b"content")
    assert cache.get("a") is None


def test_a_cache_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file"):
        BlockCache(tmp_path / "file", MINIMUM)
