"""Checkpoints as MLflow's logged models, and the final weights as a version of a registered model.

A logged model has the path of its checkpoint and its metrics, but no files. Only registered weights are
uploaded to MLflow, as `weights.safetensors`: no pickle, no code.
"""

from typing import Any

from trainer.tracking.outbox import Record

MODEL_TYPE = "UniFormerV2"


class LoggedModels:
    """The logged models of one MLflow run. Every method is idempotent: a record may be uploaded twice."""

    def __init__(self, client: Any, experiment_id: str, run_id: str) -> None:
        """client: an `MlflowClient`."""
        import mlflow.entities

        self._entities = mlflow.entities
        self._client = client
        self._experiment_id = experiment_id
        self._run_id = run_id
        self._ids: dict[str, str] = {}

    def log(self, record: Record) -> None:
        """Create the model of a checkpoint or add metrics to it.

        record: `name`, `step`, `path` of the checkpoint, `values`: metrics, `time`.
        """
        model_id = self._find(record["name"]) or self._create(record)
        metrics = [
            self._entities.Metric(key, float(value), record["time"], record["step"], model_id=model_id)
            for key, value in record["values"].items()
        ]
        if metrics:
            self._client.log_batch(self._run_id, metrics=metrics)

    def delete_others(self, record: Record) -> None:
        """Delete the models of deleted checkpoints. record: `names` of the checkpoints that remain."""
        for model in self._of_run():
            if model.name not in record["names"]:
                self._client.delete_logged_model(model.model_id)
                self._ids.pop(model.name, None)

    def register(self, record: Record) -> None:
        """Upload the weights to the model of their checkpoint and make it a version of a registered model.

        record: as for `log`, and `weights`: path of the file, `registered`: name of the registered model,
        `alias`: set to this version, or None.
        """
        self.log(record)
        model_id = self._ids[record["name"]]
        name = record["registered"]
        source = self._source(model_id)
        known = self._client.search_model_versions(f"name = '{name}'")
        version = next((found for found in known if found.source == source), None)
        if version is None:
            self._client.log_model_artifact(model_id, record["weights"])
            if not self._client.search_registered_models(f"name = '{name}'"):
                self._client.create_registered_model(name)
            version = self._client.create_model_version(
                name, source=source, run_id=self._run_id, model_id=model_id
            )
        if record["alias"] is not None:
            self._client.set_registered_model_alias(name, record["alias"], version.version)

    def _of_run(self) -> list[Any]:
        """All models of the run; MLflow returns pages of 100."""
        mine = f"source_run_id = '{self._run_id}'"
        page = self._client.search_logged_models([self._experiment_id], filter_string=mine)
        found = list(page)
        while page.token:
            page = self._client.search_logged_models(
                [self._experiment_id], filter_string=mine, page_token=page.token
            )
            found += page
        return found

    def _source(self, model_id: str) -> str:
        """The source of a registered version: the model's id on a server, the artifact folder of a database.

        For an id MLflow's database code would search its default database.
        """
        if self._client.tracking_uri.startswith(("http://", "https://")):
            return f"models:/{model_id}"
        return str(self._client.get_logged_model(model_id).artifact_location)

    def _find(self, name: str) -> str | None:
        if name not in self._ids:
            found = self._client.search_logged_models(
                [self._experiment_id],
                filter_string=f"name = '{name}' AND source_run_id = '{self._run_id}'",
                max_results=1,
            )
            if not found:
                return None
            self._ids[name] = found[0].model_id
            outputs = self._client.get_run(self._run_id).outputs
            if found[0].model_id not in {output.model_id for output in outputs.model_outputs}:
                self._show_in_run(found[0].model_id, int(found[0].tags.get("step", 0)))
        return self._ids[name]

    def _create(self, record: Record) -> str:
        model = self._client.create_logged_model(
            self._experiment_id,
            name=record["name"],
            source_run_id=self._run_id,
            tags={"step": str(record["step"]), "checkpoint": record["path"]},
            model_type=MODEL_TYPE,
        )
        model_id = str(model.model_id)
        self._show_in_run(model_id, record["step"])
        self._ids[record["name"]] = model_id
        return model_id

    def _show_in_run(self, model_id: str, step: int) -> None:
        self._client.finalize_logged_model(model_id, "READY")
        self._client.log_outputs(self._run_id, [self._entities.LoggedModelOutput(model_id, step)])
