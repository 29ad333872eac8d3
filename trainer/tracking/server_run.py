"""The MLflow run that a run folder belongs to: found again, created, checked for deletion."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.tracking.address import restore_command, sqlite_path
from trainer.tracking.run_reference import RunReference
from trainer.tracking.upload_errors import ServerUnavailable, UploadBlocked, first_line, is_refusal

LONGEST_RUN_NAME = 250  # characters; other databases than SQLite refuse more

_KEY_TAG = "trainer.key"
_PARENT_TAG = "mlflow.parentRunId"  # MLflow's own: its pages fold the runs below into the one above
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""The kind of an experiment. MLflow 3.17 opens its page on "GenAI" all the same, unless the page's address
says otherwise: see `address.run_page`."""

_STAGES = ("active", "deleted")

_log = logging.getLogger(__name__)


class ServerRun:
    """One run on MLflow's server. Raises Stopped where only a person can help, and whatever MLflow raises."""

    def __init__(self, client: Any, reference: RunReference, run_dir: Path) -> None:
        """client: an `MlflowClient` for the place's address."""
        import mlflow.entities
        import mlflow.exceptions

        self._all_runs = mlflow.entities.ViewType.ALL
        self._exception = mlflow.exceptions.MlflowException
        self._client = client
        self._reference = reference
        self._run_dir = run_dir
        self.run_id = reference.run_id or ""

    def find(self) -> RunReference:
        """The run's id: remembered, found by our key, or of a new run. Raises Stopped for a deleted one.

        Returns the place with the run's id, which is saved in the folder, too.
        """
        reference = self._reference
        if reference.run_id is not None:
            self.require_active()
            return reference
        try:
            experiment_id = self._find_experiment(reference)
            found = self._client.search_runs(
                [experiment_id],
                f"tags.`{_KEY_TAG}` = '{reference.key}'",
                run_view_type=self._all_runs,
                max_results=1,
            )
            run = found[0] if found else self._create_run(reference, experiment_id)
        except self._exception as error:
            if not is_refusal(error):
                raise
            raise UploadBlocked(f"MLflow refuses the run: {first_line(error)}.") from error
        self.run_id = self._required(str(run.info.run_id), "a run's id")
        self._reference = replace(reference, experiment_id=experiment_id, run_id=self.run_id)
        self._reference.write(self._run_dir)
        if found:
            self.require_active()
        self.delete_duplicates()
        return self._reference

    def delete_duplicates(self) -> None:
        """Delete empty runs beside ours that bear our key, which would show as RUNNING for ever.

        A request to create a run whose reply is lost or late is made again: the server may take both.
        """
        alike = self._client.search_runs(
            [self._reference.experiment_id], f"tags.`{_KEY_TAG}` = '{self._reference.key}'"
        )
        for run in alike:
            if run.info.run_id != self.run_id and not run.data.metrics and not run.data.params:
                self._client.delete_run(run.info.run_id)
                _log.warning(
                    "MLflow had created the run twice: the empty one, %s, is deleted", run.info.run_id
                )

    def require_active(self) -> None:
        """Raises Stopped where the run, or its experiment, was deleted, with the command that restores it."""
        where = f"of {self._run_dir}"
        try:
            run = self._client.get_run(self.run_id)
            if run.info.lifecycle_stage == "active":
                return
            self._required(run.info.lifecycle_stage, "whether a run is active", _STAGES)
            experiment = self._client.get_experiment(run.info.experiment_id)
        except self._exception as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise UploadBlocked(
                f"MLflow no longer has the run {self.run_id} {where}: it was deleted for good, or "
                f"{self._reference.uri} is another database than before. To deliver the whole history to a "
                f"new run: {new_run_command(self._run_dir)}."
            ) from None
        if experiment.lifecycle_stage != "active":
            self._stop_for_experiment(experiment, f"the run {self.run_id} {where}")
        restore = restore_command(self._reference.uri, kind="runs", id=self.run_id)
        raise UploadBlocked(
            f"The MLflow run {self.run_id} {where} was deleted. To restore it, and have all records "
            f"delivered: {restore} - or, to deliver the whole history to a new run: "
            f"{new_run_command(self._run_dir)}."
        )

    def _create_run(self, reference: RunReference, experiment_id: str) -> Any:
        return self._client.create_run(
            experiment_id,
            start_time=reference.started,
            run_name=reference.run_name.encode(errors="replace").decode()[:LONGEST_RUN_NAME],
            tags={_KEY_TAG: reference.key, **({_PARENT_TAG: reference.parent} if reference.parent else {})},
        )

    def _stop_for_experiment(self, experiment: Any, run: str) -> None:
        self._required(experiment.lifecycle_stage, "whether an experiment is active", _STAGES)
        restore = restore_command(self._reference.uri, kind="experiments", id=str(experiment.experiment_id))
        raise UploadBlocked(
            f"The MLflow experiment {experiment.name!r} was deleted, and with it {run}. To restore it, and "
            f"have all records delivered: {restore} - or name another with tracking.experiment: the whole "
            "history then goes there."
        )

    def _find_experiment(self, reference: RunReference) -> str:
        """The experiment's id; beside a database of our own, its artifacts go to `mlartifacts`."""
        known = self._client.get_experiment_by_name(reference.experiment)
        if known is None:
            path = sqlite_path(reference.uri)
            artifacts = None if path is None else (path.parent / "mlartifacts").as_uri()
            try:
                created = self._client.create_experiment(
                    reference.experiment, artifact_location=artifacts, tags=_EXPERIMENT_TAGS
                )
                return self._required(str(created), "an experiment's id")
            except self._exception as error:
                known = self._client.get_experiment_by_name(reference.experiment)
                if known is None:
                    raise error
                # Another run has created it meanwhile.
        if known.lifecycle_stage != "active":
            self._stop_for_experiment(known, f"the runs in it; {self._run_dir} belongs there")
        return self._required(str(known.experiment_id), "an experiment's id")

    def _required(self, value: str, what: str, allowed: tuple[str, ...] = ()) -> str:
        """A value of a reply. Raises Outage where the reply lacks it, as `{}` does."""
        if not value or (allowed and value not in allowed):
            raise ServerUnavailable(
                f"the reply from {self._reference.uri} does not say {what}: is there an MLflow server at "
                "this address, of version 3 or newer?"
            )
        return value


def new_run_command(run_dir: Path) -> str:
    """The command that delivers a run's whole history to a new MLflow run."""
    return f"uniformerv2 deliver {run_dir} --new-run"
