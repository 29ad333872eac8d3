"""Takes a spool's lines to MLflow."""

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from trainer.errors import RunError, StartAgain
from trainer.monitoring.metric_names import LOSS_MEAN
from trainer.system.secrets import Address, redacted, set_mlflow_credentials, with_credentials
from trainer.tracking.address import check_address, check_experiment, sqlite_path
from trainer.tracking.logged_models import LoggedModels
from trainer.tracking.metric_batch import METRICS_PER_CALL, BatchItem, RecordBatch
from trainer.tracking.outbox import Outbox, Record
from trainer.tracking.repeated_steps import RepeatedSteps, SentValue
from trainer.tracking.response_limit import limit_replies
from trainer.tracking.run_reference import NAME, RunReference
from trainer.tracking.server_run import ServerRun, new_run_command
from trainer.tracking.sqlite_store import ensure_database, is_partial
from trainer.tracking.upload_errors import UploadBlocked, first_line, is_refusal, is_unknown_call

PARAMS_OR_TAGS_PER_CALL = 100  # MLflow refuses more, of each

LONGEST_KEY = 250  # characters that MLflow takes
LONGEST_DIGEST = 36  # characters of a data set's digest that MLflow takes
LONGEST_VALUE = {"params": 6000, "tags": 8000}  # characters that MLflow takes

_NEW_KINDS = ("dataset", "model", "models_kept", "model_registered")  # MLflow 2 does not know all of them

_COMPARED = ("train/", "val/")  # metrics whose values a repeated step is expected to give again, but for
_NOT_COMPARED = (LOSS_MEAN,)  # a mean that begins anew with each start
_TOLERANCE = 0.01  # relative difference up to which a repeated step's value is called the same

_log = logging.getLogger(__name__)


class _Redaction(logging.Filter):
    """Takes passwords out of what MLflow logs."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redacted(record.getMessage()), ()
        if record.exc_info:
            record.exc_text = redacted(logging.Formatter().formatException(record.exc_info))
        return True


class MlflowUpload:
    """Delivers one spool. Raises Stopped where only a person can help, and whatever MLflow raises."""

    def __init__(self, outbox: Outbox) -> None:
        # Seconds, and a dependency that nothing else needs: only where there is something to deliver.
        import mlflow.entities
        import mlflow.exceptions

        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # its errors are shown by us
        for handler in logging.getLogger("mlflow").handlers:
            if not any(isinstance(known, _Redaction) for known in handler.filters):
                handler.addFilter(_Redaction())
        limit_replies()
        self._entities = mlflow.entities
        self._exception = mlflow.exceptions.MlflowException
        self._outbox = outbox
        self._reference: RunReference | None = None
        self._address: Address | None = None  # where it was given, with what it takes to log in
        self._client: Any = None
        self._run_id = ""
        self._started = 0
        self._acts: dict[str, Callable[[Record], None]] = {}
        self._repeated_steps: RepeatedSteps | None = None
        self._cut: set[str] = set()
        self._differs = False

    def run(self, new_run: bool = False, address: Address | None = None) -> None:
        """Deliver every complete line there is; what MLflow refuses is put aside and holds up nothing.

        new_run: give up MLflow's run of this folder, and deliver the whole history to a new one. address: the
        run's from now on; None leaves it where it is.
        """
        reference = RunReference.read(self._outbox.run_dir)
        if reference is None:
            if not (self._outbox.run_dir / NAME).exists():
                raise RunError(
                    f"{self._outbox.run_dir} has no {NAME}: nothing was tracked there. Name a run's folder"
                )
            raise RunError(
                f"{self._outbox.run_dir / NAME} is damaged, and no checkpoint has a copy: the next start of "
                "the run sets it aside and delivers the whole history to a new MLflow run"
            )
        with self._outbox.delivery_lock() as mine:
            if not mine:
                raise StartAgain(f"another process is delivering {self._outbox.lines_path}")
            reference = RunReference.recover(self._outbox.run_dir) or reference
            if address is not None:
                reference = replace(reference, uri=str(address), credentials=address.has_credentials)
                self._address = address
            if new_run:
                reference = self._begin_anew(reference)
            if self._reference is None or self._reference.key != reference.key:
                self._connect(reference)
            batch = RecordBatch()
            for end, line in self._outbox.undelivered():
                self._take(line, batch, end)
            self._flush(batch)

    def _begin_anew(self, reference: RunReference) -> RunReference:
        """Have the whole history delivered to a new run of MLflow."""
        self._outbox.mark_delivered(0)  # first: cut off here, the old run gets all again, and stores it once
        reference = reference.for_new_run(base=self._outbox.size())
        reference.write(self._outbox.run_dir)
        return reference

    def _connect(self, reference: RunReference) -> None:
        from mlflow.tracking import MlflowClient

        address = self._address or with_credentials(Address(reference.uri))
        is_server = address.startswith(("http://", "https://"))
        if reference.credentials and not address.has_credentials and not is_server:
            raise UploadBlocked(
                f"The database {address} is reached with a user name and a password, which are kept nowhere: "
                "give its whole address in MLFLOW_TRACKING_URI, or as tracking.uri, at each start."
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
                _log.warning("%s is new: the run's whole history goes there", path)
                reference = self._begin_anew(reference)
            ensure_database(path)
        self._client = MlflowClient(address.full)
        self._server_run = ServerRun(self._client, reference, self._outbox.run_dir)
        self._reference = self._server_run.find()
        self._run_id = self._server_run.run_id
        self._started = reference.started
        models = LoggedModels(self._client, str(self._reference.experiment_id), self._run_id)
        self._acts = {
            "artifact": self._send_artifact,
            "status": self._send_status,
            "dataset": self._send_dataset,
            "model": models.log,
            "models_kept": models.delete_others,
            "model_registered": models.register,
        }
        self._repeated_steps = RepeatedSteps(self._outbox.lines_path, reference.base)

    def _take(self, line: bytes, batch: RecordBatch, end: int) -> None:
        """Put a line's items into the batch; what is no item goes out by itself, in its turn."""
        try:
            record = json.loads(line)
            kind = record["kind"]
            if kind in batch.items or kind == "system":
                if kind == "system":
                    batch.add_system(record, self._started)
                else:
                    batch.add(record, self._repeated(record, end) if kind == "metrics" else {})
                batch.end = end
                if batch.full:
                    self._flush(batch)
                return
            act = self._acts[kind]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            self._reject({"line": line.decode(errors="replace")}, f"not a record of ours: {error!r}")
            batch.end = end
            return
        self._flush(batch)
        self._attempt(lambda: act(record), record)
        self._outbox.mark_delivered(end)

    def _repeated(self, record: Record, end: int) -> dict[str, SentValue]:
        """The metrics of a record that MLflow gets from another line; says so once where values differ."""
        assert self._repeated_steps is not None
        found = self._repeated_steps.choose(record, end)
        for key, chosen in found.items():
            value = float(record["values"][key])
            same = math.isclose(value, chosen.value, rel_tol=_TOLERANCE) or math.isnan(value)
            compared = key.startswith(_COMPARED) and key not in _NOT_COMPARED
            if not same and compared and chosen.end < end and not self._differs:
                self._differs = True
                _log.warning(
                    "step %s was done again, and %s is now %.6g instead of %.6g: MLflow keeps one value of a "
                    "step, the first. To have the new ones in a new run: %s",
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
        """One call; where MLflow refuses it, halves, down to the one item that is wrong."""
        make: Callable[[BatchItem], Any] = {
            "metrics": lambda item: self._entities.Metric(item.key, item.value, item.time, item.step),
            "params": lambda item: self._entities.Param(*self._fitting(item)),
            "tags": lambda item: self._entities.RunTag(*self._fitting(item)),
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

    def _fitting(self, item: BatchItem) -> tuple[str, str]:
        """Key and value of a parameter or tag as MLflow takes them; says once of each what was changed."""
        key, value = fitting_key(item.key), redacted(item.value.encode(errors="replace").decode())
        limit = LONGEST_VALUE[item.kind]
        changes = [f"its name is {key!r} there"] if key != item.key else []
        if len(value) > limit:
            note = f"... ({len(value)} characters)"
            value = value[: limit - len(note)] + note
            changes += [f"it is cut to {limit} characters"]
        if changes and item.key not in self._cut:
            self._cut.add(item.key)
            _log.warning(
                "MLflow cannot hold %r as it is: %s. It is whole in %s, and a recipe's value in recipe.yaml",
                item.key if len(item.key) < 100 else item.key[:100] + "...",
                " and ".join(changes),
                self._outbox.lines_path,
            )
        return key, value

    def _send_artifact(self, record: Record) -> None:
        if not Path(record["path"]).is_file():
            self._reject(record, "the file is gone")
            return
        self._server_run.require_active()  # uploading does not ask
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
            # MLflow shows the time from start to end: that of the run's work, without its waits in a queue.
            spent = record.get("seconds")
            end = record["time"] if spent is None else self._started + round(1000 * spent)
            self._client.set_terminated(self._run_id, record["status"], end_time=end)
            self._server_run.delete_duplicates()

    def _attempt(self, call: Callable[[], None], record: Record) -> None:
        try:
            call()
        except self._exception as error:
            if not (record["kind"] in _NEW_KINDS and is_unknown_call(error)):
                self._require_refusal(error)
            self._reject(record, first_line(error))
        except (KeyError, TypeError, ValueError) as error:
            self._reject(record, f"not a record of ours: {error!r}")

    def _require_refusal(self, error: Any) -> None:
        """Raises the error unless it is about the record: Stopped where the run was deleted."""
        if not is_refusal(error):
            raise error
        self._server_run.require_active()

    def _reject(self, record: Record, reason: str) -> None:
        self._outbox.reject(record, reason)
        _log.warning("MLflow refuses a line, kept in %s: %s", self._outbox.rejected_path, reason)


def fitting_key(key: str) -> str:
    """A parameter's name as MLflow takes it; one that has to be changed gets a number of its own."""
    parts = key.split("/")
    is_path = all(part not in ("", ".", "..") for part in parts)
    if re.fullmatch(r"[/\w.\- :]+", key) and is_path and len(key) <= LONGEST_KEY:
        return key
    number = hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()[:8]
    plain = re.sub(r"[^\w.\- :]", "_", key).strip(".") or "name"
    return f"{plain[: LONGEST_KEY - 9]}-{number}"
