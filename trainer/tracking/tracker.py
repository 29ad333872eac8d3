"""MLflow, from rank 0, in the background: a run neither waits for the server nor stops without it.

Every record goes to the run's spool on disk and the call returns. A daemon thread delivers. With the
server gone it tries again at growing intervals, says so once, and whatever is left when the run ends is
delivered by the next start on the same run directory or by `launch/deliver.py`.

What MLflow does with values that are not finite (measured, 3.17, sqlite): NaN is kept as NaN, infinity
becomes the largest double. A metric that is delivered twice is stored once.
"""

import json
import logging
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from trainer import RunError
from trainer.tracking.courier import Courier, first_line
from trainer.tracking.spool import Record, Spool, replace_text

Status = Literal["FINISHED", "FAILED", "KILLED"]
"""How a run ended, in MLflow's words; KILLED is a run that was asked to stop."""

METRICS_PER_CALL = 1000  # MLflow refuses more
PARAMS_OR_TAGS_PER_CALL = 100  # MLflow refuses more, of each

_REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE"}
"""MLflow's error codes for what trying again cannot mend; any other may be an outage, a proxy, a password."""

_KEY_TAG = "trainer.key"
_PARENT_TAG = "mlflow.parentRunId"  # MLflow's own: its pages fold the runs below into the one above

_ENVIRONMENT = {
    # With MLflow's defaults, one call blocks for four minutes when the server is gone.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    # Training machines call nobody but the tracking server.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Standard output is the progress display's.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Place:
    """Where a run is tracked, remembered in `mlflow_run.json`."""

    uri: str
    experiment: str
    run_name: str
    started: int
    """First start of the run, milliseconds since 1970."""
    key: str
    """Our own name for the run, a tag on it: finds a run whose creation was cut off before the id came."""
    experiment_id: str | None = None
    run_id: str | None = None
    parent: str | None = None
    """MLflow's id of the run that this one stands under."""
    folder: str = ""
    """The run's, when it was last tracked: a copy of it is another run; one that was moved is not."""

    @staticmethod
    def path(run_dir: Path) -> Path:
        return run_dir / "mlflow_run.json"

    @classmethod
    def load(cls, run_dir: Path) -> "_Place | None":
        path = cls.path(run_dir)
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def save(self, run_dir: Path) -> None:
        replace_text(self.path(run_dir), json.dumps(asdict(self), indent=2) + "\n")


class Tracker:
    """What a run tells MLflow. No method waits for the server, and none raises because of it."""

    def __init__(
        self,
        run_dir: Path,
        *,
        uri: str | None,
        experiment: str,
        run_name: str,
        parent: str | None = None,
        enabled: bool = True,
    ) -> None:
        """Start or continue the MLflow run of a run directory, and deliver what an earlier start left.

        Args:
            run_dir: the run's folder; it exists.
            uri: MLflow's address; None is MLFLOW_TRACKING_URI, else where this run was tracked before,
                else `sqlite:///mlflow.db` in the current directory. With an address other than last
                time's, the whole history goes there, to a new MLflow run.
            experiment: created where it does not exist.
            run_name: shown by MLflow.
            parent: id of the MLflow run that a new one stands under, as the runs of a sweep do.
            enabled: False makes every method do nothing.
        """
        self._spool = Spool(run_dir)
        self._enabled = enabled
        self._disk_failed = False
        self._courier: Courier | None = None
        if not enabled:
            return
        _prepare_environment()
        _choose_place(run_dir, uri, experiment, run_name, parent, self._spool).save(run_dir)
        self._append({"kind": "status", "status": "RUNNING"})
        self._courier = Courier(self._spool, "MLflow", lambda: _Delivery(self._spool).run)

    def params(self, values: Mapping[str, Any]) -> None:
        """Record parameters, a flat mapping. MLflow never changes one: a second value is put aside."""
        self._append({"kind": "params", "values": {key: str(value) for key, value in values.items()}})

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record metrics of an optimiser step, at the time of this call."""
        self._append({"kind": "metrics", "step": step, "values": {k: float(v) for k, v in values.items()}})

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags; setting one again changes it."""
        self._append({"kind": "tags", "values": {key: str(value) for key, value in values.items()}})

    def artifact(self, path: Path, folder: str = "") -> None:
        """Upload a file, as it is when delivered, into a folder of the run's artifacts."""
        self._append({"kind": "artifact", "path": str(path.absolute()), "folder": folder})

    def close(self, status: Status, timeout: float) -> int:
        """Say how the run ended and wait for the delivery.

        Args:
            status: how the run ended.
            timeout: seconds to wait at most.

        Returns:
            Lines that were not delivered in time. They stay in the spool, and a warning says how to
            deliver them.
        """
        if self._courier is None:
            return 0
        self._append({"kind": "status", "status": status})
        left = self._courier.close(timeout)
        if left:
            command = f"python launch/deliver.py {self._spool.run_dir}"
            _log.warning(
                "MLflow has not taken %d lines yet; they are kept, deliver them with: %s", left, command
            )
        return left

    def ui_command(self) -> str | None:
        """How to see the run: a command for a database, an address for a server; None if untracked."""
        place = _Place.load(self._spool.run_dir)
        if not self._enabled or place is None:
            return None
        if not place.uri.startswith("sqlite:///"):
            page = f"/#/experiments/{place.experiment_id}/runs/{place.run_id}" if place.run_id else ""
            return place.uri.rstrip("/") + page
        database = Path(place.uri.removeprefix("sqlite:///"))
        if database.is_relative_to(Path.cwd()):
            database = database.relative_to(Path.cwd())
        return f"{_mlflow_program()} ui --backend-store-uri sqlite:///{database}"

    def _append(self, record: Record) -> None:
        if not self._enabled:
            return
        try:
            self._spool.append({**record, "time": time.time_ns() // 1_000_000})
        except OSError as error:
            if not self._disk_failed:
                _log.warning("cannot write %s (%s): the run goes on untracked", self._spool.lines_path, error)
            self._disk_failed = True
            return
        self._disk_failed = False
        if self._courier:
            self._courier.wake()


def tracked_run(run_dir: Path) -> str | None:
    """MLflow's id of a run's folder; None where MLflow has not taken it yet."""
    place = _Place.load(run_dir)
    return None if place is None else place.run_id


def deliver_spool(run_dir: Path) -> int:
    """Deliver by hand what a finished run left in its spool.

    Returns:
        Lines handled, those included that MLflow refused and that lie in `mlflow.rejected.jsonl`.

    Raises:
        RunError: nothing was tracked here, MLflow cannot be reached, or another process is delivering.
    """
    _prepare_environment()
    spool = Spool(run_dir)
    waiting = spool.lines_left()
    try:
        _Delivery(spool).run()
    except RunError:
        raise
    except Exception as error:
        raise RunError(
            f"{spool.lines_left()} lines are left, MLflow does not take them: {first_line(error)}"
        ) from error
    return waiting


def _prepare_environment() -> None:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _choose_place(
    run_dir: Path, uri: str | None, experiment: str, run_name: str, parent: str | None, spool: Spool
) -> _Place:
    known = _Place.load(run_dir)
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or (known.uri if known else "sqlite:///mlflow.db")
    if uri.startswith("sqlite:///"):
        uri = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    folder = str(run_dir.absolute())
    is_copy = known is not None and known.folder not in ("", folder) and Path(known.folder).exists()
    if known and (known.uri, known.experiment) == (uri, experiment) and not is_copy:
        return replace(known, folder=folder)
    spool.advance(0)
    started = time.time_ns() // 1_000_000
    key = uuid.uuid4().hex
    return _Place(uri, experiment, run_name, started=started, key=key, parent=parent, folder=folder)


def _mlflow_program() -> str:
    """`mlflow` where the shell finds ours, else its path beside the running interpreter."""
    ours = Path(sys.executable).parent / "mlflow"
    found = shutil.which("mlflow")
    if found and Path(found) == ours:
        return "mlflow"
    return str(ours.relative_to(Path.cwd()) if ours.is_relative_to(Path.cwd()) else ours)


@dataclass(frozen=True)
class _Item:
    """One metric value, parameter or tag."""

    kind: str
    key: str
    value: Any
    time: int
    step: int | None = None


@dataclass
class _Batch:
    """Items that wait for a call, by kind, and the spool offset that the last of them ends at."""

    items: dict[str, list[_Item]] = field(default_factory=lambda: {"metrics": [], "params": [], "tags": []})
    end: int | None = None

    def add(self, record: Record) -> None:
        kind = record["kind"]
        for key, value in record["values"].items():
            value = float(value) if kind == "metrics" else value
            self.items[kind].append(_Item(kind, key, value, record["time"], record.get("step")))

    @property
    def full(self) -> bool:
        return len(self.items["metrics"]) >= METRICS_PER_CALL


class _Delivery:
    """Takes the spool's lines to MLflow. Everything here may raise whatever MLflow raises."""

    def __init__(self, spool: Spool) -> None:
        # Seconds, and a dependency that nothing else needs: only where there is something to deliver.
        import mlflow.entities
        import mlflow.exceptions
        from mlflow.tracking import MlflowClient

        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        place = _Place.load(spool.run_dir)
        if place is None:
            raise RunError(f"{spool.run_dir} has no mlflow_run.json: nothing was tracked there")
        self._entities = mlflow.entities
        self._exception = mlflow.exceptions.MlflowException
        self._spool = spool
        self._client = MlflowClient(place.uri)
        self._run_id = self._find_run(place)

    def run(self) -> None:
        """Deliver every complete line there is; what MLflow refuses is put aside and holds up nothing."""
        with self._spool.delivering() as mine:
            if not mine:
                raise RunError(f"another process is delivering {self._spool.lines_path}")
            batch = _Batch()
            for end, line in self._spool.unread():
                self._take(line, batch, end)
            self._flush(batch)

    def _take(self, line: bytes, batch: _Batch, end: int) -> None:
        """Put a line's items into the batch; what is no item goes out by itself, in its turn."""
        try:
            record = json.loads(line)
            if record["kind"] in batch.items:
                batch.add(record)
                batch.end = end
                if batch.full:
                    self._flush(batch)
                return
            act = {"artifact": self._send_artifact, "status": self._send_status}[record["kind"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._reject({"line": line.decode(errors="replace")}, f"not a record of ours: {error!r}")
            batch.end = end
            return
        self._flush(batch)
        self._attempt(lambda: act(record), record)
        self._spool.advance(end)

    def _flush(self, batch: _Batch) -> None:
        for kind, items in batch.items.items():
            size = METRICS_PER_CALL if kind == "metrics" else PARAMS_OR_TAGS_PER_CALL
            for start in range(0, len(items), size):
                self._send_items(kind, items[start : start + size])
            items.clear()
        if batch.end is not None:
            self._spool.advance(batch.end)
            batch.end = None

    def _send_items(self, kind: str, items: list[_Item]) -> None:
        """One call; where MLflow refuses it, halves, down to the one item that is wrong."""
        make: Callable[[_Item], Any] = {
            "metrics": lambda item: self._entities.Metric(item.key, item.value, item.time, item.step),
            "params": lambda item: self._entities.Param(item.key, item.value),
            "tags": lambda item: self._entities.RunTag(item.key, item.value),
        }[kind]
        try:
            self._client.log_batch(self._run_id, **{kind: [make(item) for item in items]})
        except self._exception as error:
            if error.error_code not in _REFUSALS:
                raise
            if len(items) == 1:
                self._reject(asdict(items[0]), first_line(error))
                return
            middle = len(items) // 2
            self._send_items(kind, items[:middle])
            self._send_items(kind, items[middle:])

    def _send_artifact(self, record: Record) -> None:
        if not Path(record["path"]).is_file():
            self._reject(record, "the file is gone")
            return
        self._client.log_artifact(self._run_id, record["path"], record["folder"] or None)

    def _send_status(self, record: Record) -> None:
        if record["status"] == "RUNNING":
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            self._client.set_terminated(self._run_id, record["status"], end_time=record["time"])

    def _attempt(self, call: Callable[[], None], record: Record) -> None:
        try:
            call()
        except self._exception as error:
            if error.error_code not in _REFUSALS:
                raise
            self._reject(record, first_line(error))

    def _reject(self, record: Record, reason: str) -> None:
        self._spool.reject(record, reason)
        _log.warning("MLflow refuses a line, kept in %s: %s", self._spool.rejected_path, reason)

    def _find_run(self, place: _Place) -> str:
        """The run's id: remembered, found by our key, or of a new run."""
        if place.run_id and self._exists(place.run_id):
            return place.run_id
        if place.run_id:
            _log.warning("MLflow no longer knows run %s: its whole history goes to a new one", place.run_id)
            self._spool.advance(0)
        experiment_id = self._find_experiment(place)
        found = self._client.search_runs([experiment_id], f"tags.`{_KEY_TAG}` = '{place.key}'", max_results=1)
        run = (
            found[0]
            if found
            else self._client.create_run(
                experiment_id,
                start_time=place.started,
                run_name=place.run_name,
                tags={_KEY_TAG: place.key, **({_PARENT_TAG: place.parent} if place.parent else {})},
            )
        )
        replace(place, experiment_id=experiment_id, run_id=run.info.run_id).save(self._spool.run_dir)
        return str(run.info.run_id)

    def _exists(self, run_id: str) -> bool:
        try:
            self._client.get_run(run_id)
        except self._exception as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        return True

    def _find_experiment(self, place: _Place) -> str:
        """The experiment's id; beside a database of our own, its artifacts go to `mlartifacts`."""
        known = self._client.get_experiment_by_name(place.experiment)
        if known is not None:
            return str(known.experiment_id)
        artifacts = None
        if place.uri.startswith("sqlite:///"):
            artifacts = (Path(place.uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()
        return str(self._client.create_experiment(place.experiment, artifact_location=artifacts))
