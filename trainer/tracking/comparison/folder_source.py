"""Reads runs from their directories."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from trainer.cluster.run_status import RunHistory, derive_status
from trainer.config.schema import leaves
from trainer.config.text_file import read_text
from trainer.config.yaml import MAX_TEXT, parse_yaml
from trainer.errors import RecipeError, RunError
from trainer.monitoring.run_dir import find_run_dirs
from trainer.secrets import redacted
from trainer.system.files import find_number
from trainer.tracking.comparison.events import MOST_EVALUATIONS, RunEvents, read_curve, read_events
from trainer.tracking.comparison.runs import FINGERPRINTS, ComparedRun

T = TypeVar("T")

SCORES = "scores.parquet"
_MOST_BYTES = 2**24  # of a JSON file that is read whole
_STATES = "step-*/state.json"  # of a run's checkpoints
_FINGERPRINT = "data.train (fingerprint)"  # its name in a checkpoint's state.json
_RESULTS = ("clips_per_second", "data_wait_share", "mfu", "gpu_hours", "quarantined")


def read_folder(path: Path) -> ComparedRun:
    """Read a run from its directory. The run's notes name what is missing or damaged."""
    history = RunHistory(path)
    state = derive_status(path.name, history, None, time.time())
    run = ComparedRun(str(path), path.absolute().name, state.state, folder=path)
    if state.reason:
        run.notes.append(f"{state.state}: {state.reason}")
    run.recipe = _read_or_note(path / "recipe.yaml", _read_recipe, dict[str, str](), run.notes)
    events_path = path / "events.jsonl"
    events = _read_or_note(events_path, read_events, RunEvents([], None, None, None, False), run.notes)
    if events.too_many:
        run.notes.append(f"{events_path.name}: only the first {MOST_EVALUATIONS:,} evaluations were read")
    finished = run.status == "finished"
    summary = (
        _read_or_note(path / "summary.json", _read_json, dict[str, Any](), run.notes) if finished else {}
    )
    run.evaluations = events.evaluations
    run.results = results_of(summary, events)
    run.data = _fingerprints(path, events)
    run.read_curve = lambda: _read_or_note(events_path, read_curve, None, [])  # noted above
    run.find_scores = lambda: path / SCORES if (path / SCORES).is_file() else None
    parent = run.recipe.get("tracking.parent_run")
    run.parent = None if parent in (None, "None") else parent
    return run


def results_of(summary: dict[str, Any], events: RunEvents) -> dict[str, float]:
    """A run's results: of the whole training where it ended, else as of its last step.

    Args:
        summary: the contents of `summary.json`; empty for a run that did not end.
        events: of the run.
    """
    last_step = events.last_step or {}
    found: dict[str, float | None] = {
        "step": find_number(last_step, "step"),
        "total_steps": find_number(last_step, "total_steps"),
        "train_loss": events.train_loss,
        "hours": _hours(last_step, "spent"),
        "gpu_hours": _hours(last_step, "device_seconds"),
    }
    found |= {name: find_number(last_step, name) for name in _RESULTS if name != "gpu_hours"}
    whole: dict[str, float | None] = {name: find_number(summary, name) for name in _RESULTS}
    whole |= {"step": find_number(summary, "steps"), "hours": _hours(summary, "seconds")}
    return known_results(found, whole)


def known_results(last: dict[str, float | None], whole: dict[str, float | None]) -> dict[str, float]:
    """The finite ones of a run's results: of the whole training where known, else as of its last step."""
    found = [*last.items(), *whole.items()]  # the later one of a name counts
    return {name: value for name, value in found if value is not None and math.isfinite(value)}


def recipe_of(text: str, source: str) -> dict[str, str]:
    """A resolved recipe's fields by their dotted names, as text, as in MLflow; without the recipe's name.

    Not validated against the schema, so that recipes of earlier versions can be compared. Raises RecipeError.
    """
    tree = parse_yaml(text, source).value
    if not isinstance(tree, dict):
        raise RecipeError(f"{source}: a recipe is a mapping of fields to values")
    return {name: redacted(str(value)) for name, value in leaves(tree, "") if name != "name"}


def _hours(record: dict[str, Any], name: str) -> float | None:
    seconds = find_number(record, name)
    return None if seconds is None else seconds / 3600


def _read_or_note(path: Path, read: Callable[[Path], T], empty: T, notes: list[str]) -> T:
    """`read(path)`; `empty`, and a note, where the file is missing or damaged."""
    try:
        return read(path)
    except FileNotFoundError:
        notes.append(f"it has no {path.name}")
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror or error}")
    except (ValueError, RecursionError, RecipeError) as error:
        notes.append(f"{path.name}: {error}")
    return empty


def _read_recipe(path: Path) -> dict[str, str]:
    return recipe_of(read_text(path, MAX_TEXT), str(path))


def _read_json(path: Path) -> dict[str, Any]:
    found = json.loads(read_text(path, _MOST_BYTES))
    return found if isinstance(found, dict) else {}


def _fingerprints(path: Path, events: RunEvents) -> dict[str, str]:
    """Of the latest start; of a run of an earlier version, the training data's from its newest checkpoint."""
    started = events.started or {}
    found = {name: started[name] for name in FINGERPRINTS if isinstance(started.get(name), str)}
    if "train_fingerprint" in found:
        return found
    for state in sorted((path / "checkpoints").glob(_STATES), reverse=True):
        settled = _read_or_note(state, _read_json, dict[str, Any](), []).get("settled")
        if isinstance(settled, dict) and isinstance(settled.get(_FINGERPRINT), str):
            return {**found, "train_fingerprint": settled[_FINGERPRINT]}
    return found


def find_compared_runs(folder: Path) -> list[Path]:
    """The run directories at `folder`, as `find_run_dirs`. Raises RunError where none can be found."""
    if not folder.is_dir():
        raise RunError(f"{folder}: there is no such folder, and it is not an id of an MLflow run (32 digits)")
    found = find_run_dirs(folder)
    if not found:
        raise RunError(f"{folder}: no run directory, and none is in it; a run directory has a recipe.yaml")
    return found
