"""MLflow, from rank 0, in the background: a run neither waits for the server nor stops without it.

Every record goes to the run's spool on disk and the call returns. A daemon thread delivers. With the
server gone it tries again at growing intervals, says so once, and whatever is left when the run ends is
delivered by the next start on the same run directory or by `launch/deliver.py`.

What MLflow does with values that are not finite (measured, 3.17, sqlite): NaN is kept as NaN, infinity
would become the largest double. A metric that is delivered twice is stored once.
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
from trainer.system.secrets import redacted, set_mlflow_credentials, with_credentials
from trainer.tracking.address import check_address, check_experiment, choose_address, how_to_see
from trainer.tracking.connectivity import check_reachable
from trainer.tracking.mlflow_upload import MlflowUpload
from trainer.tracking.outbox import Outbox, Record
from trainer.tracking.run_reference import NAME, RunReference
from trainer.tracking.upload_errors import UploadBlocked, first_line
from trainer.tracking.uploader import Uploader

Status = Literal["FINISHED", "FAILED", "KILLED"]
"""How a run ended, in MLflow's words; KILLED is a run that was asked to stop."""

DatasetUse = Literal["training", "validation"]
"""What a data set is used for, in MLflow's words."""

_ENVIRONMENT = {
    # With MLflow's defaults, one call blocks for four minutes when the server is gone.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    # Training machines call nobody but the tracking server.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Standard output is the progress display's.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}

_log = logging.getLogger(__name__)


class MlflowTracker:
    """What a run tells MLflow. No method waits for the server, and none raises because of it."""

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
        """Start or continue the MLflow run of a run directory, and deliver what an earlier start left.

        Args:
            run_dir: the run's folder; it exists.
            uri: MLflow's address; None is MLFLOW_TRACKING_URI, else where this run was tracked before,
                else `sqlite:///mlflow.db` in the current directory. With an address other than last
                time's, the whole history goes there, to a new MLflow run.
            experiment: created where it does not exist.
            run_name: shown by MLflow.
            parent: id of the MLflow run that a new one stands under, as the runs of a sweep do.
            step: the run goes on after this one; a later step that was recorded before is done again.
            trains: False where a finished run is evaluated again: its status stays what it is.
            enabled: False makes every method do nothing.
        """
        self._outbox = Outbox(run_dir)
        self._enabled = enabled
        self._trains = trains
        self._disk_failed = False
        self._ended = False  # readings of the machine come from a thread, which ends later
        self._uploader: Uploader | None = None
        if not enabled:
            return
        prepare_environment()
        try:
            _choose_reference(run_dir, uri, experiment, run_name, parent, self._outbox).write(run_dir)
        except OSError as error:
            _log.warning("cannot read and write %s (%s): the run goes on untracked", run_dir, error)
            self._enabled = False
            return
        if trains:
            self._append({"kind": "status", "status": "RUNNING", "step": step})
        self._uploader = Uploader(self._outbox, "MLflow", lambda: MlflowUpload(self._outbox).run)

    def record_params(self, values: Mapping[str, Any]) -> None:
        """Record parameters, a flat mapping. MLflow never changes one: a second value is put aside."""
        self._append({"kind": "params", "values": _texts(values)})

    def record_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record metrics of an optimiser step, at the time of this call.

        An infinite value, which MLflow shows as 1.8e308, is left out; `NAME_infinite` is 1 or -1 instead.
        """
        self._append({"kind": "metrics", "step": step, "values": _without_infinity(values)})

    def record_system_metrics(self, values: Mapping[str, float]) -> None:
        """Record readings of the machines, at the time of this call. Names begin with `system/`."""
        self._append({"kind": "system", "values": _without_infinity(values)})

    def record_dataset(
        self,
        path: Path,
        context: DatasetUse,
        *,
        digest: str,
        profile: Mapping[str, Any],
    ) -> None:
        """Record a manifest that the run reads. profile: what is to be known of it, as rows and classes."""
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
        """Record a checkpoint as a logged model, or more metrics of one. path: its folder."""
        self._append({"kind": "model", **_model(path, step, values)})

    def record_kept_checkpoints(self, names: Sequence[str]) -> None:
        """Delete the logged models of all checkpoints but these. names: of their folders."""
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
            path, step, values: of the checkpoint, as for `model`.
            weights: the file that is uploaded.
            name: of the registered model, created where there is none.
            alias: leads to this version afterwards; None leaves aliases alone.
        """
        record = {"weights": str(weights.absolute()), "registered": name, "alias": alias}
        self._append({"kind": "model_registered", **_model(path, step, values), **record})

    def set_tags(self, values: Mapping[str, Any]) -> None:
        """Set tags; setting one again changes it."""
        self._append({"kind": "tags", "values": _texts(values)})

    def upload_artifact(self, path: Path, folder: str = "") -> None:
        """Upload a file, as it is when delivered, into a folder of the run's artifacts."""
        self._append({"kind": "artifact", "path": str(path.absolute()), "folder": folder})

    def close(self, status: Status, timeout: float, seconds: float | None = None) -> int:
        """Say how the run ended and wait for the delivery.

        Args:
            status: how the run ended.
            timeout: seconds to wait at most.
            seconds: that the run has worked in all its starts, which MLflow shows as its duration; None is
                from its first start to now.

        Returns:
            Lines that were not delivered in time. They stay in the spool, and a warning says how to
            deliver them.
        """
        if self._uploader is None:
            return 0
        if self._trains:
            self._append(
                {"kind": "status", "status": status, **({} if seconds is None else {"seconds": seconds})}
            )
        self._ended = True
        left = self._uploader.close(timeout)
        if left:
            command = f"uniformerv2 deliver {self._outbox.run_dir}"
            _log.warning(
                "MLflow has not taken %d lines yet; they are kept, deliver them with: %s", left, command
            )
        return left

    def how_to_see(self) -> str | None:
        """How to see the run, see `address.how_to_see`; None if untracked."""
        reference = None
        with suppress(OSError):
            reference = RunReference.read(self._outbox.run_dir) if self._enabled else None
        return (
            None
            if reference is None
            else how_to_see(reference.uri, reference.experiment_id, reference.run_id)
        )

    def _append(self, record: Record) -> None:
        if not self._enabled or self._ended:
            return
        try:
            self._outbox.append({**record, "time": time.time_ns() // 1_000_000})
        except OSError as error:
            if not self._disk_failed:
                _log.warning(
                    "cannot write %s (%s): the run goes on untracked", self._outbox.lines_path, error
                )
            self._disk_failed = True
            return
        self._disk_failed = False
        if self._uploader:
            self._uploader.notify()


def find_mlflow_run_id(run_dir: Path) -> str | None:
    """MLflow's id of a run's folder; None where MLflow has not taken it yet.

    Raises RunError where the folder's file cannot be read.
    """
    reference = _read_reference(run_dir)
    return None if reference is None else reference.run_id


def check_tracking(run_dir: Path, *, uri: str | None, experiment: str, ask: bool = False) -> None:
    """Raises RunError for an address or a name that MLflow can never use.

    ask: also connect to a server where this run has not been yet, see `check_reachable`.
    """
    known = _read_reference(run_dir)
    address, source = choose_address(uri, known.uri if known else None)
    check_address(address, source)
    check_experiment(experiment)
    if ask and (known is None or known.run_id is None or known.uri != str(address)):
        check_reachable(address, source)


def deliver_outbox(run_dir: Path, new_run: bool = False, uri: str | None = None) -> int:
    """Deliver by hand what a finished run left in its spool.

    Args:
        run_dir: the run's folder.
        new_run: deliver the run's whole history to a new MLflow run, which it then goes on with.
        uri: MLflow's address; None is where the run is tracked. Another one than that gets the whole history,
            in a new MLflow run, which the run then goes on with.

    Returns:
        Lines handled, those included that MLflow refused and that lie in `mlflow.rejected.jsonl`.

    Raises:
        StartAgain: MLflow cannot be reached, or another process is delivering.
        RunError: nothing was tracked here, the folder cannot be written, or the MLflow run was deleted.
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
    except UploadBlocked as error:
        raise RunError(f"{outbox.count_undelivered()} lines are left, and kept. {error}") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise RunError(
                f"{outbox.count_undelivered()} lines are left, and kept. {first_line(error)}"
            ) from None
        raise StartAgain(
            f"{outbox.count_undelivered()} lines are left, MLflow does not take them: {first_line(error)}"
        ) from error
    return waiting


def _read_reference(run_dir: Path) -> RunReference | None:
    try:
        return RunReference.read(run_dir)
    except OSError as error:
        raise RunError(
            f"{run_dir / NAME} cannot be read: {error.strerror}. It says which MLflow run this is"
        ) from None


def prepare_environment() -> None:
    """Set MLflow's variables for this process where they are not set: short waits, no telemetry."""
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
            asks = known.credentials or address.has_credentials
            return replace(known, uri=str(address), folder=folder, credentials=asks)
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
