"""Records of a run for MLflow: rank 0 writes them to the outbox, and a daemon thread uploads them.

A call returns as soon as the record is on disk. While the server is down, the thread retries at growing
intervals and logs one warning. Records that are left when the run ends are uploaded by the next start in the
same run directory or by `launch/deliver.py`.

Measured with MLflow 3.17 and SQLite: NaN is stored as NaN, infinity as the largest double. A metric value
that is sent twice is stored once.
"""

import errno
import logging
import math
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from trainer.errors import RunError, StartAgain
from trainer.secrets import redacted, set_mlflow_credentials, with_credentials
from trainer.tracking.address import (
    check_address,
    check_experiment,
    check_reachable,
    choose_address,
    how_to_see,
)
from trainer.tracking.mlflow_upload import MlflowUpload
from trainer.tracking.outbox import Outbox, Record
from trainer.tracking.run_reference import NAME, RunReference
from trainer.tracking.upload_errors import UploadBlocked, first_line
from trainer.tracking.uploader import Uploader

Status = Literal["FINISHED", "FAILED", "KILLED"]
"""MLflow's run statuses; KILLED is a run that was requested to stop."""

DatasetUse = Literal["training", "validation"]
"""MLflow's contexts of a data set."""

_ENVIRONMENT = {
    # With MLflow's defaults, one call blocks for four minutes when the server is down.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    # Training machines contact the tracking server only.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Standard output belongs to the progress display.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}

_log = logging.getLogger(__name__)


class MlflowTracker:
    """The MLflow run of a run directory. Only `close` waits for the server, and no server error is raised."""

    def __init__(
        self,
        run_dir: Path,
        *,
        uri: str | None,
        experiment: str,
        run_name: str,
        parent: str | None = None,
        step: int = 0,
        trains: bool = True,
        enabled: bool = True,
    ) -> None:
        """Start or continue the MLflow run, and upload what an earlier start left in the outbox.

        Args:
            run_dir: the run's folder; it must exist.
            uri: MLflow's address; None takes MLFLOW_TRACKING_URI, else the run's earlier address, else
                `sqlite:///mlflow.db` in the current directory. For a new address the whole history is
                uploaded to a new MLflow run.
            experiment: created if it does not exist.
            run_name: name of the run in MLflow.
            parent: id of the parent MLflow run, as for the runs of a sweep.
            step: the run continues after this step; steps recorded beyond it are repeated.
            trains: False if a finished run is evaluated again; its status does not change.
            enabled: False makes every method a no-op.
        """
        self._outbox = Outbox(run_dir)
        self._enabled = enabled
        self._trains = trains
        self._disk_failed = False
        self._closed = False  # the node monitor's thread may record after `close`
        self._uploader: Uploader | None = None
        if not enabled:
            return
        prepare_environment()
        try:
            _choose_reference(run_dir, uri, experiment, run_name, parent, self._outbox).write(run_dir)
        except OSError as error:
            _log.warning("cannot read or write %s (%s): the run is not tracked", run_dir, error)
            self._enabled = False
            return
        if trains:
            self._append({"kind": "status", "status": "RUNNING", "step": step})
        self._uploader = Uploader(self._outbox, lambda: MlflowUpload(self._outbox).run)

    def record_params(self, values: Mapping[str, Any]) -> None:
        """Record parameters, a flat mapping. MLflow refuses a second value of a parameter."""
        self._append({"kind": "params", "values": _texts(values)})

    def record_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record metrics of an optimiser step with the current time.

        An infinite value, which MLflow shows as 1.8e308, is replaced by `NAME_infinite` = 1 or -1.
        """
        self._append({"kind": "metrics", "step": step, "values": _without_infinity(values)})

    def record_system_metrics(self, values: Mapping[str, float]) -> None:
        """Record hardware metrics of the nodes with the current time. Names begin with `system/`."""
        self._append({"kind": "system", "values": _without_infinity(values)})

    def record_dataset(
        self,
        path: Path,
        context: DatasetUse,
        *,
        digest: str,
        profile: Mapping[str, Any],
    ) -> None:
        """Record a manifest that the run reads. profile: numbers about it, such as rows and classes."""
        self._append(
            {
                "kind": "dataset",
                "name": f"{path.parent.name}/{path.name}".lstrip("/"),
                "path": redacted(str(path.absolute())),
                "context": context,
                "digest": digest,
                "profile": dict(profile),
            }
        )

    def record_checkpoint(self, path: Path, step: int, values: Mapping[str, float]) -> None:
        """Record a checkpoint as a logged model, or add metrics to it. path: its folder."""
        self._append({"kind": "model", **_model(path, step, values)})

    def record_kept_checkpoints(self, names: Sequence[str]) -> None:
        """Delete the logged models of all other checkpoints. names: folders of the checkpoints that exist."""
        self._append({"kind": "models_kept", "names": list(names)})

    def register_weights(
        self,
        path: Path,
        step: int,
        values: Mapping[str, float],
        *,
        weights: Path,
        name: str,
        alias: str | None,
    ) -> None:
        """Make a checkpoint's weights a version of a registered model.

        Args:
            path, step, values: of the checkpoint, as for `record_checkpoint`.
            weights: the file that is uploaded.
            name: the registered model, created if it does not exist.
            alias: set to the new version; None changes no alias.
        """
        record = {"weights": str(weights.absolute()), "registered": name, "alias": alias}
        self._append({"kind": "model_registered", **_model(path, step, values), **record})

    def set_tags(self, values: Mapping[str, Any]) -> None:
        """Set tags; a tag may be changed."""
        self._append({"kind": "tags", "values": _texts(values)})

    def upload_artifact(self, path: Path, folder: str = "") -> None:
        """Upload a file, with its content at the time of the upload, to a folder of the run's artifacts."""
        self._append({"kind": "artifact", "path": str(path.absolute()), "folder": folder})

    def close(self, status: Status, timeout: float, seconds: float | None = None) -> int:
        """Record the run's status and wait for the upload.

        Args:
            status: how the run ended.
            timeout: seconds to wait at most.
            seconds: working time of all starts, which MLflow shows as the duration; None is the time since
                the first start.

        Returns:
            Number of lines that were not uploaded in time. They stay in the outbox; a warning has the command
            that uploads them.
        """
        if self._uploader is None:
            return 0
        if self._trains:
            self._append(
                {"kind": "status", "status": status, **({} if seconds is None else {"seconds": seconds})}
            )
        self._closed = True
        left = self._uploader.close(timeout)
        if left:
            command = f"uniformerv2 deliver {self._outbox.run_dir}"
            _log.warning("%d lines are not uploaded to MLflow; upload them with: %s", left, command)
        return left

    def how_to_see(self) -> str | None:
        """How to view the run, see `address.how_to_see`; None if it is not tracked."""
        reference = None
        with suppress(OSError):
            reference = RunReference.read(self._outbox.run_dir) if self._enabled else None
        if reference is None:
            return None
        return how_to_see(reference.uri, reference.experiment_id, reference.run_id)

    def _append(self, record: Record) -> None:
        if not self._enabled or self._closed:
            return
        try:
            self._outbox.append({**record, "time": time.time_ns() // 1_000_000})
        except OSError as error:
            if not self._disk_failed:
                _log.warning("cannot write %s (%s): MLflow records are lost", self._outbox.lines_path, error)
            self._disk_failed = True
            return
        self._disk_failed = False
        if self._uploader:
            self._uploader.notify()


def find_mlflow_run_id(run_dir: Path) -> str | None:
    """The MLflow run id of a run directory; None before the first upload.

    Raises RunError if `mlflow_run.json` cannot be read.
    """
    reference = _read_reference(run_dir)
    return None if reference is None else reference.run_id


def check_tracking(run_dir: Path, *, uri: str | None, experiment: str, ask: bool = False) -> None:
    """Raises RunError for an address or an experiment name that MLflow cannot use.

    ask: also contact the server if the run is new to it, see `check_reachable`.
    """
    known = _read_reference(run_dir)
    address, source = choose_address(uri, known.uri if known else None)
    check_address(address, source)
    check_experiment(experiment)
    if ask and (known is None or known.run_id is None or known.uri != str(address)):
        check_reachable(address, source)


def deliver_outbox(run_dir: Path, new_run: bool = False, uri: str | None = None) -> int:
    """Upload the records that a run left in its outbox.

    Args:
        run_dir: the run's folder.
        new_run: upload the whole history to a new MLflow run, which the run then continues.
        uri: MLflow's address; None is the run's own. For another address the whole history is uploaded to a
            new MLflow run, which the run then continues.

    Returns:
        Number of lines, including those that MLflow refused (`mlflow.rejected.jsonl`).

    Raises:
        StartAgain: MLflow cannot be reached, or another process is uploading.
        RunError: the run was not tracked, its folder cannot be written, or the MLflow run was deleted.
    """
    prepare_environment()
    outbox = Outbox(run_dir)
    address = None
    if uri is not None:
        address, _ = choose_address(uri, None)
        check_address(address, "--uri")
        set_mlflow_credentials(address)
        known = _read_reference(run_dir)
        new_run = new_run or (known is not None and known.uri != str(address))
    waiting = outbox.count_lines() if new_run else outbox.count_undelivered()
    try:
        MlflowUpload(outbox).run(new_run, address)
    except RunError:
        raise
    except Exception as error:
        left = f"{outbox.count_undelivered()} lines are not uploaded"
        if isinstance(error, UploadBlocked):
            raise RunError(f"{left}. {error}") from None
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise RunError(f"{left}. {first_line(error)}") from None
        raise StartAgain(f"{left} to MLflow: {first_line(error)}") from error
    return waiting


def _read_reference(run_dir: Path) -> RunReference | None:
    try:
        return RunReference.read(run_dir)
    except OSError as error:
        raise RunError(
            f"{run_dir / NAME} cannot be read: {error.strerror}. It holds the id of the MLflow run"
        ) from None


def prepare_environment() -> None:
    """Set MLflow's environment variables unless they are set: short timeouts, no telemetry."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _choose_reference(
    run_dir: Path, uri: str | None, experiment: str, run_name: str, parent: str | None, outbox: Outbox
) -> RunReference:
    known = RunReference.recover(run_dir)
    address, _ = choose_address(uri, known.uri if known else None)
    address = with_credentials(address)
    set_mlflow_credentials(address)
    folder = str(run_dir.absolute())
    is_copy = known is not None and known.folder not in ("", folder) and Path(known.folder).exists()
    if known is not None and not is_copy:
        same, _ = choose_address(known.uri, None)
        if (str(same), known.experiment) == (str(address), experiment):
            credentials = known.credentials or address.has_credentials
            return replace(known, uri=str(address), folder=folder, credentials=credentials)
    outbox.mark_delivered(0)
    return RunReference(
        str(address),
        experiment,
        run_name,
        started=time.time_ns() // 1_000_000,
        key=uuid.uuid4().hex,
        parent=parent,
        folder=folder,
        credentials=address.has_credentials,
        base=outbox.size(),
    )


def _model(path: Path, step: int, values: Mapping[str, float]) -> Record:
    finite = {key: float(value) for key, value in values.items() if math.isfinite(value)}
    return {"name": path.name, "step": step, "path": redacted(str(path.absolute())), "values": finite}


def _without_infinity(values: Mapping[str, float]) -> dict[str, float]:
    return {
        (f"{key}_infinite" if math.isinf(value) else key): (
            math.copysign(1, value) if math.isinf(value) else value
        )
        for key, value in ((key, float(value)) for key, value in values.items())
    }


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: redacted(str(value)) for key, value in values.items()}
