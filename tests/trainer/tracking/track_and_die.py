"""A process that tracks steps of a run until it is killed: `track_and_die.py RUN_DIR URI FIRST LAST`.

It continues after step FIRST, prints `step N` when a step is recorded, and ends the run after step LAST.
"""

import sys
import time
from pathlib import Path

from trainer.tracking.mlflow_tracker import MlflowTracker

run_dir, uri, first, last = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
run_dir.mkdir(exist_ok=True)
tracker = MlflowTracker(run_dir, uri=uri, experiment="killed", run_name="run", step=first)
tracker.record_params({"a": 1})
for step in range(first + 1, last + 1):
    tracker.record_metrics(step, {"train/loss": 1 / step, "speed/clips_per_second": time.time()})
    print("step", step, flush=True)
    time.sleep(0.02)
print("left", tracker.close("FINISHED", 120.0), flush=True)
