"""Memory over long runs: it must not grow with the number of clips."""

import os
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import MotionSet
from tests.pipelines.batches import ALL, loader, options

CLIPS = 20_000
BATCH = 20
WARM_UP = 2_000  # clips until every buffer has held its largest sample
EVERY = 200  # clips between two measurements


def resident_bytes(*processes: int) -> int:
    """Resident set of the processes together; pages they share count for each."""
    pages = sum(int(Path(f"/proc/{process}/statm").read_text().split()[1]) for process in processes)
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.soak
def test_memory_grows_by_less_than_one_percent_over_20_000_clips(motion_set: MotionSet) -> None:
    """With all stages: three codecs decoded by PyAV, RandAugment, jitter, repeats."""
    clips = loader(motion_set.train, ALL, batch=BATCH, repeats=2, how=options(workers=2))
    processes = [os.getpid(), *(process.pid or 0 for process in clips._workers)]
    seen, made = [], 0
    for batch in clips:
        made += len(batch.ids)
        if made % EVERY == 0:
            seen.append((made, resident_bytes(*processes)))
        if made >= CLIPS + WARM_UP:
            break
    clips.close()
    counts, resident = np.array([entry for entry in seen if entry[0] >= WARM_UP], float).T
    slope = np.polyfit(counts, resident, 1)[0] * CLIPS / resident[0]  # growth over CLIPS, as a share
    ends = resident[-10:].mean() / resident[:10].mean() - 1
    print(
        f"\nresident memory of {len(processes)} processes: {resident[0] / 2**20:.1f} MiB after {WARM_UP} "
        f"clips, {resident[-1] / 2**20:.1f} MiB after {CLIPS} more; slope {100 * slope:+.3f} % of that, "
        f"{slope * resident[0] / CLIPS:.0f} bytes a clip"
    )
    assert slope < 0.01
    assert ends < 0.01
