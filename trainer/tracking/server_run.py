"""The MLflow run of a run directory on the server: found, created, checked for deletion."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.tracking.address import restore_command, sqlite_path
from trainer.tracking.run_reference import RunReference
from trainer.tracking.upload_errors import ServerUnavailable, UploadBlocked, first_line, is_refusal

LONGEST_RUN_NAME = 250  # characters: the limit of databases other than SQLite

_KEY_TAG = "trainer.key"
_PARENT_TAG = "mlflow.parentRunId"  # MLflow's own: its pages nest child runs under their parent
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""The kind of an experiment. MLflow 3.17 also needs a workflowType in the URL, see `address.how_to_see`."""

_STAGES = ("active", "deleted")

_log = logging.getLogger(__name__)


class ServerRun:
    """One run on MLflow's server. Raises UploadBlocked if a retry is useless, and MLflow's own exceptions."""

    def __init__(self, client: Any, reference: RunReference, run_dir: Path) -> None:
        """client: an `MlflowClient` for the reference's address."""
        import mlflow.entities
        import mlflow.exceptions

        self._all_runs = mlflow.entities.ViewType.ALL
        self._exception = mlflow.exceptions.MlflowException
        self._client = client
        self._reference = reference
        self._run_dir = run_dir
        self.run_id = reference.run_id or ""

    def find(self) -> RunReference:
        """Find the run by its id or key, or create it. Raises UploadBlocked if it was deleted.

        Writes the id to `mlflow_run.json` and returns the reference with it.
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
        """Delete other, empty runs with this run's key, which would stay RUNNING forever.

        A request to create a run is repeated if its response is lost or late; the server may execute both.
        """
        alike = self._client.search_runs(
            [self._reference.experiment_id], f"tags.`{_KEY_TAG}` = '{self._reference.key}'"
        )
        for run in alike:
            if run.info.run_id != self.run_id and not run.data.metrics and not run.data.params:
                self._client.delete_run(run.info.run_id)
                _log.warning(
                    "MLflow created the run twice; the empty duplicate %s was deleted", run.info.run_id
                )

    def require_active(self) -> None:
        """Raises UploadBlocked, with the command to restore it, if the run or its experiment was deleted."""
        where = f"of {self._run_dir}"
        try:
            run = self._client.get_run(self.run_id)
            if run.info.lifecycle_stage == "active":
                return
            self._required(run.info.lifecycle_stage, "the state of a run", _STAGES)
            experiment = self._client.get_experiment(run.info.experiment_id)
        except self._exception as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise UploadBlocked(
                f"{self._reference.uri} has no run {self.run_id} {where}: it was deleted permanently, or the "
                "database is another one. To upload the whole history to a new run: "
                f"{new_run_command(self._run_dir)}."
            ) from None
        if experiment.lifecycle_stage != "active":
            self._stop_for_experiment(experiment, f"the run {self.run_id} {where}")
        restore = restore_command(self._reference.uri, kind="runs", id=self.run_id)
        raise UploadBlocked(
            f"The MLflow run {self.run_id} {where} was deleted. To restore it, so that all records are "
            f"uploaded: {restore} - or, to upload the whole history to a new run: "
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
        self._required(experiment.lifecycle_stage, "the state of an experiment", _STAGES)
        restore = restore_command(self._reference.uri, kind="experiments", id=str(experiment.experiment_id))
        raise UploadBlocked(
            f"The MLflow experiment {experiment.name!r} was deleted, and with it {run}. To restore it, so "
            f"that all records are uploaded: {restore} - or set tracking.experiment to another name: the "
            "whole history is then uploaded to that experiment."
        )

    def _find_experiment(self, reference: RunReference) -> str:
        """The experiment's id. For an SQLite file its artifacts are in `mlartifacts` beside the file."""
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
                # Another run created it in the meantime.
        if known.lifecycle_stage != "active":
            self._stop_for_experiment(known, f"its runs; {self._run_dir} belongs to it")
        return self._required(str(known.experiment_id), "an experiment's id")

    def _required(self, value: str, what: str, allowed: tuple[str, ...] = ()) -> str:
        """A value of a response. Raises ServerUnavailable if the response lacks it."""
        if not value or (allowed and value not in allowed):
            raise ServerUnavailable(
                f"the response of {self._reference.uri} lacks {what}: check that it is the address of an "
                "MLflow server of version 3 or newer"
            )
        return value


def new_run_command(run_dir: Path) -> str:
    """The command that uploads a run's whole history to a new MLflow run."""
    return f"uniformerv2 deliver {run_dir} --new-run"
