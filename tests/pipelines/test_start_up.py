"""From a process's start to its first batch, over ten million rows."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.dataset.manifest import Manifest
from pipelines.sampling.sampler import TrainSampler
from tests.conftest import MotionSet
from tests.pipelines.big_manifest import make_big_manifest

ROWS = 10_000_000
STEP = 10**6

PROGRAM = """
import sys, time
from pathlib import Path
begun = time.perf_counter()
from tests.pipelines.batches import ALL, loader, options

if __name__ == "__main__":
    imported = time.perf_counter()
    clips = loader(Path(sys.argv[1]), ALL, batch=32, first_step=int(sys.argv[2]), how=options(workers=2))
    opened = time.perf_counter()
    batch = next(iter(clips))
    made = time.perf_counter()
    clips.close()
    print(imported - begun, opened - imported, made - opened)
    print(*batch.ids.tolist(), bool(batch.valid.all()))
"""


@pytest.mark.soak
def test_the_first_batch_of_ten_million_rows(motion_set: MotionSet, tmp_path: Path) -> None:
    """In the middle of the stream, with imports and workers. The times are printed, not tested."""
    manifest = make_big_manifest(tmp_path / "big.arrow", Manifest.open(motion_set.train), ROWS)
    program = tmp_path / "first_batch.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(manifest.path), str(STEP)]
    root = Path(__file__).parents[2]
    result = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=root, env={"PYTHONPATH": str(root)}
    )
    times, batch = result.stdout.splitlines()
    sampler = TrainSampler(ROWS, 32, seed=3)
    assert batch.split() == [*(str(sampler.slot(STEP, index).sample) for index in range(32)), "True"]
    print("\nimports {} s, loader {} s, first batch {} s".format(*(f"{float(t):.1f}" for t in times.split())))
