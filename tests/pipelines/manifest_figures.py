"""Figures for docs/performance.md: opening and verifying a manifest of many rows, and probing videos.

python -m tests.pipelines.manifest_figures [ROWS]
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.dataset.manifest import ROWS_PER_BATCH, write_columns
from pipelines.dataset.prepare.listing import Listing
from pipelines.dataset.prepare.probe_listing import probe_part
from tests.pipelines.videos import Kind, make_video

_NAMES = tuple(f"class {number}" for number in range(400))
_VIDEOS = 2000

# In a process of its own. What it imports does not count.
_PEAK = """
import sys, time
from pipelines.dataset.manifest import Manifest
from pipelines.dataset.prepare.verify import verify_manifest

def peak():  # MiB, pages of mapped files included
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
"""

OPEN = (
    _PEAK
    + """
before, begin = peak(), time.perf_counter()
manifest = Manifest.open(sys.argv[1])
opened = time.perf_counter() - begin
manifest.row(len(manifest) // 2)
print(f"open: {1000 * opened:.1f} ms; {peak() - before:.1f} MiB more than before; {peak():.0f} MiB in all")
"""
)

VERIFY = (
    _PEAK
    + """
manifest, begin = Manifest.open(sys.argv[1]), time.process_time()
assert not verify_manifest(manifest).problems.total
used = time.process_time() - begin
print(f"verify: {used:.1f} CPU s, {len(manifest) / used:,.0f} rows a CPU second; {peak():.0f} MiB in all")
"""
)


def write_rows(path: Path, rows: int) -> None:
    """A manifest of rows with different paths, as those of Kinetics."""
    write_columns(path, _batches(rows), _NAMES)


def _batches(rows: int) -> Iterator[pa.RecordBatch]:
    chance = np.random.default_rng(0)
    for begin in range(0, rows, ROWS_PER_BATCH):
        count = min(ROWS_PER_BATCH, rows - begin)
        numbers = range(begin, begin + count)
        zeros = pa.array(np.zeros(count, np.int64))
        yield pa.RecordBatch.from_pydict({
            "path": [f"videos/{row % 997:03d}/{row:011d}_000010_000020.mp4" for row in numbers],
            "offset": zeros, "length": zeros,
            "label": pa.array(chance.integers(0, len(_NAMES), count, np.int32)),
            "frames": pa.array(chance.integers(50, 300, count, np.int32)),
            "fps": pa.array(np.full(count, 30, np.float32)),
            "width": pa.array(np.full(count, 340, np.int32)),
            "height": pa.array(np.full(count, 256, np.int32)),
            "codec": ["h264"] * count,
        })  # fmt: skip


def probe(folder: Path) -> str:
    """Probe a video of 300 frames under many names, with one worker process."""
    video = make_video(folder, Kind("libx264", "mp4", {"g": "250"}, frames=300, size=(256, 340)))
    paths = [str(folder / f"{number}.mp4") for number in range(_VIDEOS)]
    for path in paths:
        os.link(video, path)
    listing = Listing(paths, [0] * len(paths), ("a",))
    begin, before = time.perf_counter(), _cpu_seconds()
    probe_part(folder / "m.arrow", listing, (0, 1), workers=1)
    used, took = _cpu_seconds() - before, time.perf_counter() - begin
    rates = f"{_VIDEOS / used:.0f} a CPU second, {_VIDEOS / took:.0f} a second with one worker process"
    return f"probe: {_VIDEOS} videos of 340x256, 300 frames: {rates}, its start included"


def _cpu_seconds() -> float:
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000_000
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.arrow"
        begin = time.process_time()
        write_rows(path, rows)
        size = path.stat().st_size
        print(
            f"write: {rows:,} rows, {size / 1e9:.2f} GB, {time.process_time() - begin:.0f} CPU s", flush=True
        )
        for program in (OPEN, VERIFY):
            subprocess.run([sys.executable, "-c", program, str(path)], check=True)
        print(probe(Path(folder)), flush=True)


if __name__ == "__main__":
    main()
