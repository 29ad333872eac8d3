"""What was tracked of a start that a run does not go on from."""

import os
import time
from pathlib import Path

from trainer.tracking.outbox import Outbox
from trainer.tracking.run_reference import NAME


def archive_tracking(run_dir: Path) -> Path | None:
    """Let the next start be an MLflow run of its own: move what an earlier one told MLflow aside.

    Parameters of an MLflow run never change, so that a training with others would be recorded with the
    earlier ones. What was not delivered can be, with launch/deliver.py and that folder. Returns the folder;
    None where nothing was tracked. Raises OSError.
    """
    outbox = Outbox(run_dir)
    if not (run_dir / NAME).exists():
        return None
    folder = run_dir / f"mlflow-{time.strftime('%Y%m%d-%H%M%S')}"
    folder.mkdir()
    others = (outbox.lines_path, run_dir / "mlflow.offset", outbox.rejected_path)
    for path in (*others, run_dir / NAME):  # the place last: until then the run goes on in it
        if path.exists():
            os.replace(path, folder / path.name)
    return folder
