"""A dataset of ten million rows takes no more memory than a small one, with any order of drawing."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines.dataset.manifest import Manifest
from tests.pipelines.big_manifest import make_big_manifest

# In a process of its own, because the one that wrote the manifests has their pages in its memory already.
# What it imports and does first with a small dataset does not count.
PROGRAM = """
import json, sys
from pipelines.dataset.concat import Dataset
from pipelines.sampling.sampler import Part, TrainSampler

def resident():  # bytes of the process's own memory, and of the pages of files it has mapped and touched
    with open("/proc/self/status") as file:
        sizes = dict(line.split(":", 1) for line in file)
    return [int(sizes[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")]

def use(paths):
    stages = {"before": resident()}
    dataset = Dataset.open(paths)
    parts = tuple(Part(len(m), 1.0, m if m.weighted else None) for m in dataset.manifests)
    sampler = TrainSampler(len(dataset), 64, seed=0, parts=parts)
    stages["opened"] = resident()
    slots = [sampler.slot(step, place) for step in (0, 10**9) for place in range(64)]
    files = [str(dataset.path(slot.sample)) for slot in slots]
    stages["used"] = resident()
    return {"rows": len(dataset), "files": files, **stages}

use(sys.argv[1].split(","))
print(json.dumps(use(sys.argv[2].split(","))))
"""


def usage(small: list[Path], big: list[Path]) -> dict:
    command = [sys.executable, "-c", PROGRAM, ",".join(map(str, small)), ",".join(map(str, big))]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def share_touched(motion_set, folder: Path, rows: int) -> float:
    """Check that opening and using two manifests of `rows` rows, one of them with weights, costs no memory.

    Returns the share of their files' pages that 128 draws brought into memory; all processes share those, and
    how many more than those that are needed the kernel maps is its own affair.
    """
    videos = Manifest.open(motion_set.train)
    kinds = {"plain": False, "weighted": True}
    big, small = (
        [
            make_big_manifest(folder / f"{kind}{n}.arrow", videos, n, weighted=w).path
            for kind, w in kinds.items()
        ]
        for n in (rows, 1000)
    )
    found = usage(small, big)
    assert found["rows"] == 2 * rows
    assert all(Path(path).is_file() for path in found["files"])
    assert len(set(found["files"])) > 16
    before, opened, used = (np.array(found[stage]) for stage in ("before", "opened", "used"))
    assert sum(opened - before) < 4e6
    assert used[0] - opened[0] < 4e6
    share = (used[1] - opened[1]) / sum(path.stat().st_size for path in big)
    print(
        "own and mapped, bytes: opening", opened - before, "using", used - opened, f"{share:.1%} of the files"
    )
    return share


def test_a_big_manifest_repeats_the_videos(motion_set, tmp_path):
    videos = Manifest.open(motion_set.train)
    made = make_big_manifest(tmp_path / "m.arrow", videos, 70_000, weighted=True)
    made.verify()
    assert len(made) == 70_000
    for index in (0, 31, 32, 65_535, 65_536, 69_999):
        row, original = made.row(index), videos.row(index % 32)
        assert made.absolute_path(row) == videos.absolute_path(original)
        assert (row.label, row.frames, row.codec) == (original.label, original.frames, original.codec)
        assert 0.5 <= row.weight <= 1.5


def test_half_a_million_rows_cost_no_memory(motion_set, tmp_path):
    share_touched(motion_set, tmp_path, 500_000)


@pytest.mark.soak
def test_ten_million_rows_cost_no_memory(motion_set, tmp_path):
    assert share_touched(motion_set, tmp_path, 10_000_000) < 0.2
