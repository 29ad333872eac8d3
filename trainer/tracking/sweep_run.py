"""The MLflow run that is the parent of the runs of a sweep."""

from collections.abc import Mapping
from pathlib import Path

from trainer.config.schema import TrackingSection
from trainer.errors import RunError
from trainer.tracking.mlflow_tracker import MlflowTracker, find_mlflow_run_id

_TIMEOUT = 60.0  # seconds until MLflow must have stored it


def create_sweep_run(home: Path, tracking: TrackingSection, params: Mapping[str, object]) -> str | None:
    """Create the parent run of a sweep, or find it where the sweep is submitted again.

    home: folder of the sweep. Returns the run's id, None where the runs are not tracked. Raises RunError when
    MLflow cannot be reached.
    """
    if not tracking.enabled:
        return None
    home.mkdir(parents=True, exist_ok=True)
    tracker = MlflowTracker(home, uri=tracking.uri, experiment=tracking.experiment, run_name=home.name)
    tracker.record_params(dict(params))
    tracker.close("FINISHED", _TIMEOUT)
    found = find_mlflow_run_id(home)
    if found is None:
        raise RunError(
            "MLflow cannot be reached, and the runs of a sweep need a parent run there: correct "
            "tracking.uri or MLFLOW_TRACKING_URI, or give --set tracking.enabled=false"
        )
    return found
