"""Uploads the records of an outbox to MLflow."""

import hashlib
import json
import logging
import math
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from trainer.errors import RunError, StartAgain
from trainer.monitoring.metric_names import LOSS_MEAN
from trainer.secrets import Address, redacted, set_mlflow_credentials, with_credentials
from trainer.tracking.address import check_address, check_experiment, sqlite_path
from trainer.tracking.logged_models import LoggedModels
from trainer.tracking.outbox import Outbox, Record
from trainer.tracking.repeated_steps import RepeatedSteps, SentValue
from trainer.tracking.response_limit import limit_replies
from trainer.tracking.run_reference import NAME, RunReference
from trainer.tracking.server_run import ServerRun, new_run_command
from trainer.tracking.sqlite_store import ensure_database, is_partial
from trainer.tracking.upload_errors import UploadBlocked, first_line, is_refusal, is_unknown_call

METRICS_PER_CALL = 1000  # MLflow refuses more
PARAMS_OR_TAGS_PER_CALL = 100  # MLflow refuses more, of each

# MLflow's limits in characters.
LONGEST_KEY = 250
LONGEST_DIGEST = 36  # of a data set
LONGEST_VALUE = {"params": 6000, "tags": 8000}

_NEW_KINDS = ("dataset", "model", "models_kept", "model_registered")  # MLflow 2 lacks some of these calls

_COMPARED = ("train/", "val/")  # metrics that should have the same value when a step is repeated
_NOT_COMPARED = (LOSS_MEAN,)  # each start computes this mean from its own steps
_TOLERANCE = 0.01  # largest relative difference of a repeated value

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchItem:
    """One metric value, parameter or tag."""

    kind: str
    key: str
    value: Any
    time: int
    step: int | None = None


@dataclass
class RecordBatch:
    """Items that wait to be sent in one call.

    items: by kind (`metrics`, `params`, `tags`).
    end: offset in the outbox at which the last of them ends.
    """

    items: dict[str, list[BatchItem]] = field(
        default_factory=lambda: {"metrics": [], "params": [], "tags": []}
    )
    end: int | None = None

    def add(self, kind: str, record: Record, step: int | None, without: Mapping[str, SentValue]) -> None:
        for key, value in record["values"].items():
            value = float(value) if kind == "metrics" else str(value)
            if key not in without:
                self.items[kind].append(BatchItem(kind, str(key), value, record["time"], step))

    @property
    def full(self) -> bool:
        return len(self.items["metrics"]) >= METRICS_PER_CALL


class _Redaction(logging.Filter):
    """Removes passwords from MLflow's log records."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redacted(record.getMessage()), ()
        if record.exc_info:
            record.exc_text = redacted(logging.Formatter().formatException(record.exc_info))
        return True


class MlflowUpload:
    """Uploads one outbox. Raises UploadBlocked if a retry is useless, and MLflow's own exceptions."""

    def __init__(self, outbox: Outbox) -> None:
        # The import takes seconds, and nothing else needs MLflow.
        import mlflow.entities
        import mlflow.exceptions

        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # MlflowUpload logs its errors
        for handler in logging.getLogger("mlflow").handlers:
            if not any(isinstance(known, _Redaction) for known in handler.filters):
                handler.addFilter(_Redaction())
        limit_replies()
        self._entities = mlflow.entities
        self._exception = mlflow.exceptions.MlflowException
        self._outbox = outbox
        self._reference: RunReference | None = None
        self._address: Address | None = None  # as given to `run`, with credentials
        self._client: Any = None
        self._run_id = ""
        self._started = 0
        self._handlers: dict[str, Callable[[Record], None]] = {}
        self._repeated_steps: RepeatedSteps | None = None
        self._shortened: set[str] = set()
        self._differs = False

    def run(self, new_run: bool = False, address: Address | None = None) -> None:
        """Upload all complete lines. Records that MLflow refuses go to `mlflow.rejected.jsonl`.

        Args:
            new_run: upload the whole history to a new MLflow run, which replaces the current one.
            address: the run's new address; None keeps the current one.
        """
        reference = RunReference.read(self._outbox.run_dir)
        if reference is None:
            if not (self._outbox.run_dir / NAME).exists():
                raise RunError(
                    f"{self._outbox.run_dir} has no {NAME}: it is not a run directory, or the run was not "
                    "tracked"
                )
            raise RunError(
                f"{self._outbox.run_dir / NAME} is damaged, and no checkpoint has a copy: the next start of "
                "the run renames it and uploads the whole history to a new MLflow run"
            )
        with self._outbox.delivery_lock() as is_locked:
            if not is_locked:
                raise StartAgain(f"another process is uploading {self._outbox.lines_path}")
            reference = RunReference.recover(self._outbox.run_dir) or reference
            if address is not None:
                reference = replace(reference, uri=str(address), credentials=address.has_credentials)
                self._address = address
            if new_run:
                reference = self._start_new_run(reference)
            if self._reference is None or self._reference.key != reference.key:
                self._connect(reference)
            batch = RecordBatch()
            for end, line in self._outbox.undelivered():
                self._process(line, batch, end)
            self._flush(batch)

    def _start_new_run(self, reference: RunReference) -> RunReference:
        """Prepare the upload of the whole history to a new MLflow run."""
        self._outbox.mark_delivered(0)  # first: after a crash here the old run gets all values once more
        reference = replace(
            reference, key=uuid.uuid4().hex, run_id=None, experiment_id=None, base=self._outbox.size()
        )
        reference.write(self._outbox.run_dir)
        return reference

    def _connect(self, reference: RunReference) -> None:
        from mlflow.tracking import MlflowClient

        address = self._address or with_credentials(Address(reference.uri))
        is_server = address.startswith(("http://", "https://"))
        if reference.credentials and not address.has_credentials and not is_server:
            raise UploadBlocked(
                f"The database {address} needs a user name and a password, which no file holds: give its "
                "whole address in MLFLOW_TRACKING_URI or tracking.uri at each start."
            )
        try:
            check_address(address, NAME)
            check_experiment(reference.experiment)
        except RunError as error:
            raise UploadBlocked(f"{error}.") from None
        set_mlflow_credentials(address)
        path = sqlite_path(address)
        if path is not None:
            if reference.run_id is not None and is_partial(path):
                _log.warning("%s is new: the whole history of the run is uploaded to it", path)
                reference = self._start_new_run(reference)
            ensure_database(path)
        self._client = MlflowClient(address.full)
        self._server_run = ServerRun(self._client, reference, self._outbox.run_dir)
        self._reference = self._server_run.find()
        self._run_id = self._server_run.run_id
        self._started = reference.started
        models = LoggedModels(self._client, str(self._reference.experiment_id), self._run_id)
        self._handlers = {
            "artifact": self._send_artifact,
            "status": self._send_status,
            "dataset": self._send_dataset,
            "model": models.log,
            "models_kept": models.delete_others,
            "model_registered": models.register,
        }
        self._repeated_steps = RepeatedSteps(self._outbox.lines_path, reference.base)

    def _process(self, line: bytes, batch: RecordBatch, end: int) -> None:
        """Add a line's items to the batch; a record of another kind is sent by itself, after the batch."""
        try:
            record = json.loads(line)
            kind = record["kind"]
            if kind == "system" or kind in batch.items:
                if kind == "system":  # hardware metrics have no step: it is the seconds since the start
                    batch.add("metrics", record, max(0, (record["time"] - self._started) // 1000), {})
                else:
                    sent = self._repeated(record, end) if kind == "metrics" else {}
                    batch.add(kind, record, record.get("step"), sent)
                batch.end = end
                if batch.full:
                    self._flush(batch)
                return
            handler = self._handlers[kind]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            self._reject({"line": line.decode(errors="replace")}, f"no valid record: {error!r}")
            batch.end = end
            return
        self._flush(batch)
        self._attempt(handler, record)
        self._outbox.mark_delivered(end)

    def _repeated(self, record: Record, end: int) -> dict[str, SentValue]:
        """The metrics of a record that another line sends; logs once that values differ."""
        assert self._repeated_steps is not None
        found = self._repeated_steps.choose(record, end)
        for key, chosen in found.items():
            value = float(record["values"][key])
            same = math.isclose(value, chosen.value, rel_tol=_TOLERANCE) or math.isnan(value)
            compared = key.startswith(_COMPARED) and key not in _NOT_COMPARED
            if not same and compared and chosen.end < end and not self._differs:
                self._differs = True
                _log.warning(
                    "step %s was repeated, and %s is %.6g instead of %.6g: MLflow keeps the first value of a "
                    "step. To upload the new values to a new run: %s",
                    record["step"],
                    key,
                    value,
                    chosen.value,
                    new_run_command(self._outbox.run_dir),
                )
        return found

    def _flush(self, batch: RecordBatch) -> None:
        for kind, items in batch.items.items():
            size = METRICS_PER_CALL if kind == "metrics" else PARAMS_OR_TAGS_PER_CALL
            for start in range(0, len(items), size):
                self._send_items(kind, items[start : start + size])
            items.clear()
        if batch.end is not None:
            self._outbox.mark_delivered(batch.end)
            batch.end = None

    def _send_items(self, kind: str, items: list[BatchItem]) -> None:
        """Send the items in one call. If MLflow refuses them, send each half, down to the wrong item."""
        make: Callable[[BatchItem], Any] = {
            "metrics": lambda item: self._entities.Metric(item.key, item.value, item.time, item.step),
            "params": lambda item: self._entities.Param(*self._shorten(item)),
            "tags": lambda item: self._entities.RunTag(*self._shorten(item)),
        }[kind]
        try:
            self._client.log_batch(self._run_id, **{kind: [make(item) for item in items]})
        except self._exception as error:
            self._require_refusal(error)
            if len(items) == 1:
                self._reject(asdict(items[0]), first_line(error))
                return
            middle = len(items) // 2
            self._send_items(kind, items[:middle])
            self._send_items(kind, items[middle:])

    def _shorten(self, item: BatchItem) -> tuple[str, str]:
        """Key and value of a parameter or tag within MLflow's limits; logs once per key what was changed."""
        key, value = valid_key(item.key), redacted(item.value.encode(errors="replace").decode())
        limit = LONGEST_VALUE[item.kind]
        changes = [f"its name in MLflow is {key!r}"] if key != item.key else []
        if len(value) > limit:
            note = f"... ({len(value)} characters)"
            value = value[: limit - len(note)] + note
            changes += [f"it is shortened to {limit} characters"]
        if changes and item.key not in self._shortened:
            self._shortened.add(item.key)
            _log.warning(
                "MLflow's limits change %r: %s. The full value is in %s, and a recipe's value in recipe.yaml",
                item.key if len(item.key) < 100 else item.key[:100] + "...",
                " and ".join(changes),
                self._outbox.lines_path,
            )
        return key, value

    def _send_artifact(self, record: Record) -> None:
        if not Path(record["path"]).is_file():
            self._reject(record, "the file does not exist")
            return
        self._server_run.require_active()  # MLflow uploads to deleted runs, too
        self._client.log_artifact(self._run_id, record["path"], record["folder"] or None)

    def _send_dataset(self, record: Record) -> None:
        profile = json.dumps(record["profile"])
        source = json.dumps({"uri": record["path"]})
        digest = record["digest"][:LONGEST_DIGEST]
        dataset = self._entities.Dataset(record["name"], digest, "local", source, None, profile)
        context = self._entities.InputTag("mlflow.data.context", record["context"])
        self._client.log_inputs(self._run_id, [self._entities.DatasetInput(dataset, [context])])

    def _send_status(self, record: Record) -> None:
        if record["status"] == "RUNNING":
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            # MLflow shows the time from start to end; the end is set so that waits in a queue do not count.
            spent = record.get("seconds")
            end = record["time"] if spent is None else self._started + round(1000 * spent)
            self._client.set_terminated(self._run_id, record["status"], end_time=end)
            self._server_run.delete_duplicates()

    def _attempt(self, handler: Callable[[Record], None], record: Record) -> None:
        try:
            handler(record)
        except self._exception as error:
            if not (record["kind"] in _NEW_KINDS and is_unknown_call(error)):
                self._require_refusal(error)
            self._reject(record, first_line(error))
        except (KeyError, TypeError, ValueError) as error:
            self._reject(record, f"no valid record: {error!r}")

    def _require_refusal(self, error: Any) -> None:
        """Raises the error unless MLflow refused the record; UploadBlocked if the run was deleted."""
        if not is_refusal(error):
            raise error
        self._server_run.require_active()

    def _reject(self, record: Record, reason: str) -> None:
        self._outbox.reject(record, reason)
        _log.warning("MLflow refuses a record, see %s: %s", self._outbox.rejected_path, reason)


def valid_key(key: str) -> str:
    """A parameter's name that MLflow accepts; a changed name gets a hash, so that names stay different."""
    parts = key.split("/")
    is_path = all(part not in ("", ".", "..") for part in parts)
    if re.fullmatch(r"[/\w.\- :]+", key) and is_path and len(key) <= LONGEST_KEY:
        return key
    number = hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()[:8]
    plain = re.sub(r"[^\w.\- :]", "_", key).strip(".") or "name"
    return f"{plain[: LONGEST_KEY - 9]}-{number}"
