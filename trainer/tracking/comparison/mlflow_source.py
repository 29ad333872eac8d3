"""Reads runs from MLflow: one search for what a table needs, then the evaluations of many runs in parallel.

A search returns each run's parameters, tags and latest metrics. Three things take a request per run: the
evaluations, since the best one is not the latest; recipe.yaml of runs that were started again, whose
parameters are those of the first start; and curves and scores of runs that are drawn or tested.
"""

import logging
import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.worker_pool import Progress
from trainer.config.text_file import read_text
from trainer.config.yaml import MAX_TEXT
from trainer.errors import RecipeError, RunError, StartAgain
from trainer.monitoring.metric_names import LOSS_MEAN, VAL, VIDEOS, WALL_CLOCK, WHOLE_RUN
from trainer.secrets import redacted, set_mlflow_credentials, with_credentials
from trainer.tracking.address import check_address, choose_address, sqlite_path
from trainer.tracking.comparison.events import POINTS
from trainer.tracking.comparison.folder_source import SCORES, known_results, recipe_of
from trainer.tracking.comparison.runs import FINGERPRINTS, ComparedRun, Curve, RecordedEvaluation
from trainer.tracking.mlflow_tracker import prepare_environment
from trainer.tracking.sqlite_store import is_partial
from trainer.tracking.upload_errors import first_line, is_refusal

_PAGE = 500  # runs that a search gives at once
_CALLS_AT_ONCE = 8
_STATUSES = {
    "FINISHED": "finished",
    "RUNNING": "running",
    "FAILED": "failed",
    "KILLED": "stopped",
    "SCHEDULED": "waiting",
}
_RESULTS = {
    "clips_per_second": f"{WALL_CLOCK}clips_per_second",
    "data_wait_share": f"{WALL_CLOCK}data_wait_share",
    "mfu": f"{WALL_CLOCK}mfu",
    "gpu_hours": f"{WALL_CLOCK}gpu_hours",
    "quarantined": f"{VIDEOS}quarantined",
    "step": f"{WALL_CLOCK}step",
}
"""By a result's name, the metric that has it as of the last step; `whole_run/...` has it of the whole run."""


class MlflowSource:
    """Runs on one MLflow server or in one database. Only `save` writes."""

    def __init__(self, uri: str | None) -> None:
        """uri: None takes MLFLOW_TRACKING_URI, else `sqlite:///mlflow.db` in the current directory.

        Raises RunError for an address that MLflow cannot use, and for a database that does not exist.
        """
        prepare_environment()
        address, source = choose_address(uri, None)
        source = "--uri" if source == "tracking.uri" else source
        check_address(address, source)
        address = with_credentials(address)
        set_mlflow_credentials(address)
        path = sqlite_path(address)
        if path is not None and is_partial(path):
            raise RunError(f"{source}: {path} holds no MLflow database; name another with --uri")

        import mlflow.exceptions  # seconds, so late
        from mlflow.tracking import MlflowClient

        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        self._exception = mlflow.exceptions.MlflowException
        self._client = MlflowClient(address.full)
        self._address = str(address)
        self._downloads = tempfile.TemporaryDirectory(prefix="compare-")

    def search(
        self, experiment: str | None, filter_string: str, progress: Progress = lambda done, total: None
    ) -> list[ComparedRun]:
        """The training runs of an experiment (None: of all) that match a filter in MLflow's language.

        Raises RunError for an experiment that does not exist and for a filter that MLflow refuses, StartAgain
        where MLflow does not answer.
        """
        with self._translated_errors(filter_string):
            experiments = self._experiments(experiment)
            page = self._client.search_runs(experiments, filter_string, max_results=_PAGE)
            found = list(page)
            while page.token:
                page = self._client.search_runs(
                    experiments, filter_string, max_results=_PAGE, page_token=page.token
                )
                found += page
            # The parent run of a sweep trained nothing.
            return self._compared([run for run in found if "sweep" not in run.data.params], progress)

    def runs(self, ids: Sequence[str]) -> list[ComparedRun]:
        """The runs with these ids. Raises as `search`; RunError for an id that does not exist."""
        found = []
        for run_id in ids:
            with self._translated_errors(f"run {run_id}"):
                found.append(self._client.get_run(run_id))
        with self._translated_errors(""):
            return self._compared(found, lambda done, total: None)

    def save(self, run_id: str, files: Sequence[Path], folder: str) -> None:
        """Upload files as artifacts of a run. Raises as `runs`."""
        with self._translated_errors(f"run {run_id}"):
            self._client.get_run(run_id)
            for file in files:
                self._client.log_artifact(run_id, str(file), folder)

    def close(self) -> None:
        """Delete what was downloaded."""
        self._downloads.cleanup()

    @contextmanager
    def _translated_errors(self, request: str) -> Iterator[None]:
        """Raises RunError for a request that MLflow refuses, and StartAgain where it does not answer."""
        try:
            yield
        except self._exception as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST" or is_refusal(error):
                raise RunError(f"{self._address}: {request}: {first_line(error)}") from None
            raise StartAgain(f"MLflow at {self._address} does not answer: {first_line(error)}") from None

    def _experiments(self, name: str | None) -> list[str]:
        if name is not None:
            known = self._client.get_experiment_by_name(name)
            if known is not None:
                return [str(known.experiment_id)]
        every = self._client.search_experiments()
        if name is None:
            return [str(experiment.experiment_id) for experiment in every]
        names = [experiment.name for experiment in every]
        near = get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names[:10])}"
        raise RunError(f"{self._address}: --experiment {name!r}: there is no such experiment; {hint}")

    def _compared(self, found: Sequence[Any], progress: Progress) -> list[ComparedRun]:
        runs: list[ComparedRun] = []
        with ThreadPoolExecutor(_CALLS_AT_ONCE) as pool:
            try:
                for run in pool.map(self._run, found):
                    runs.append(run)
                    progress(len(runs), len(found))
            except BaseException:  # Ctrl-C does not wait for queued requests
                pool.shutdown(cancel_futures=True)
                raise
        return runs

    def _run(self, found: Any) -> ComparedRun:
        metrics, tags, run_id = found.data.metrics, found.data.tags, str(found.info.run_id)
        status = _STATUSES.get(found.info.status, found.info.status.lower())
        run = ComparedRun(run_id, str(found.info.run_name or run_id), status)
        run.recipe = {name: redacted(text) for name, text in found.data.params.items() if name != "name"}
        run.data = {name: tags[name] for name in FINGERPRINTS if name in tags}
        run.parent = tags.get("mlflow.parentRunId")
        if not run.recipe or tags.get("starts", "1") != "1":
            self._read_recipe(run)
        run.results = _results(metrics, status)
        if (total := tags.get("total_steps", "")).isdecimal():
            run.results["total_steps"] = float(total)
        run.evaluations = self._evaluations(run_id, metrics)
        run.read_curve = lambda: self._curve(run_id, metrics)
        run.find_scores = lambda: self._download(run_id, SCORES)
        return run

    def _read_recipe(self, run: ComparedRun) -> None:
        path = self._download(run.source, "recipe.yaml")
        if path is None:
            run.notes.append("MLflow has no recipe.yaml of it; its fields are those of its first start")
            return
        try:
            run.recipe = recipe_of(read_text(path, MAX_TEXT), "recipe.yaml")
        except (OSError, ValueError, RecipeError) as error:
            run.notes.append(f"recipe.yaml in MLflow cannot be used: {error}")

    def _download(self, run_id: str, name: str) -> Path | None:
        """An artifact as a local file; None where the run has no artifact of this name."""
        folder = Path(self._downloads.name) / run_id
        folder.mkdir(exist_ok=True)
        try:
            return Path(self._client.download_artifacts(run_id, name, str(folder)))
        except (OSError, self._exception):  # artifact stores differ in the error for a missing one
            return None

    def _history(self, run_id: str, name: str, metrics: dict[str, float]) -> list[tuple[int, float]]:
        """(step, value) by step, the first value recorded of each; empty for a metric that the run does not
        have."""
        if name not in metrics:
            return []
        values: dict[int, tuple[int, float]] = {}
        for metric in self._client.get_metric_history(run_id, name):
            if metric.step not in values or metric.timestamp < values[metric.step][0]:
                values[metric.step] = metric.timestamp, metric.value
        return [(step, values[step][1]) for step in sorted(values)]

    def _evaluations(self, run_id: str, metrics: dict[str, float]) -> list[RecordedEvaluation]:
        top5 = dict(self._history(run_id, f"{VAL}top5", metrics))
        found = [
            RecordedEvaluation(step, top1, top5.get(step))
            for step, top1 in self._history(run_id, f"{VAL}top1", metrics)
            if math.isfinite(top1)
        ]
        loss = metrics.get(f"{VAL}loss", math.nan)  # the latest: tables have only the last evaluation's
        if found and math.isfinite(loss):
            found[-1] = replace(found[-1], loss=loss)
        return found

    def _curve(self, run_id: str, metrics: dict[str, float]) -> Curve | None:
        loss = self._history(run_id, "train/loss", metrics)
        if not loss:
            return None
        loss = loss[:: math.ceil(len(loss) / POINTS)]
        steps = np.array([step for step, _ in loss], float)

        def at_steps(name: str) -> np.ndarray:
            values = dict(self._history(run_id, name, metrics))
            return np.array([values.get(step, math.nan) for step, _ in loss], float)

        hours, gpu_hours = at_steps(f"{WALL_CLOCK}hours"), at_steps(f"{WALL_CLOCK}gpu_hours")
        return Curve(steps, np.array([value for _, value in loss], float), hours, gpu_hours)


def _results(metrics: dict[str, float], status: str) -> dict[str, float]:
    """As `folder_source.results_of`."""
    found = {name: metrics.get(metric) for name, metric in _RESULTS.items()}
    found |= {"train_loss": metrics.get(LOSS_MEAN), "hours": metrics.get(f"{WALL_CLOCK}hours")}
    whole: dict[str, float | None] = {}
    if status == "finished":
        whole = {name: metrics.get(f"{WHOLE_RUN}{name}") for name in _RESULTS}  # its step is named `steps`
        seconds = metrics.get(f"{WHOLE_RUN}seconds")
        hours = None if seconds is None else seconds / 3600
        whole |= {"step": metrics.get(f"{WHOLE_RUN}steps"), "hours": hours}
    return known_results(found, whole)


def is_run_id(text: str) -> bool:
    """Whether a text has the form of MLflow's run ids."""
    return re.fullmatch(r"[0-9a-f]{32}", text) is not None
