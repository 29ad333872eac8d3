"""The run directory: all that is needed to evaluate, predict and continue.

```
runs/<name>/
  recipe.yaml            the resolved recipe
  environment.json       versions, devices, host of the latest start
  decoding.json          where decoding is split: DALI's share, as measured first
  checkpoints/           step-0000123/, ...
  events.jsonl           one line per step, evaluation, checkpoint, start and end
  quarantine.jsonl       videos that could not be used, and why
  decoder_crashes.json   clips over which DALI's decoder ended a rank
  in-flight/             which batches the ranks are at, while DALI decodes
  skipped.json           how many steps changed nothing, because their numbers were not finite
  confusion.png          of the latest evaluation
  scores.parquet         of the evaluation after the last step: what the model says of each video
  summary.json           what came out
  weights.safetensors    the final weights, with class names and preprocessing inside
  weights-best.safetensors  those of the best evaluation, where an earlier step's was better
  mlflow*.json*          the outbox for MLflow
  STOP                   created by a person to stop the run after a checkpoint
  not-finite/, hangs/, failures/   reports on nonfinite steps, hanging ranks and errors
  lock/                  the attempt that holds or last held the directory
  slurm/, logs/          of a SLURM job: its script, its attempts; a log of each rank
```
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.errors import RunError
from trainer.system.files import (
    BestEffort,
    append_lines,
    find_number,
    parse_records,
    read_json,
    write_json,
    write_text,
)

_MARKS = ("recipe.yaml", "events.jsonl", "summary.json", "slurm/jobs.jsonl", "slurm/turns.jsonl")
_FOLDERS = ("not-finite", "hangs", "failures", "lock", "slurm", "logs")  # written by others than `RunDir`
_TAIL = 2**16  # bytes at the end of the events that are read


def check_not_of_run(out: Path) -> None:
    """Raises RunError where writing `out` would replace a file of a run directory, or one to come."""
    path = out.resolve()
    for parent in path.parents:
        run = RunDir(parent)
        if run.events.is_file() and any(own in (path, *path.parents) for own in run.own_paths()):
            raise RunError(f"{out} is a file of the run in {parent}; name another with --out")


class RunDir:
    """The directory of one run; apart from checkpoints, only rank 0 writes to it.

    best_effort: for events, bad videos and pictures, which a full disk drops.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.environment = path / "environment.json"
        self.checkpoints = path / "checkpoints"
        self.events = path / "events.jsonl"
        self.quarantine = path / "quarantine.jsonl"
        self.confusion = path / "confusion.png"
        self.scores = path / "scores.parquet"
        self.summary = path / "summary.json"
        self.weights = path / "weights.safetensors"
        self.best_weights = path / "weights-best.safetensors"
        self.stop = path / "STOP"
        self.mlflow = path / "mlflow_run.json"
        self.decoding = path / "decoding.json"
        self.skipped = path / "skipped.json"
        self.decoder_crashes = path / "decoder_crashes.json"
        self.in_flight = path / "in-flight"
        self.checkpointed_files = (self.quarantine, self.mlflow, self.decoding)
        """Files that are copied into every checkpoint."""
        self.best_effort = BestEffort()
        self._owed: list[dict[str, Any]] = []  # bad videos that are not written yet

    def own_paths(self) -> list[Path]:
        """The files and folders that a run writes."""
        files = [value for name, value in vars(self).items() if isinstance(value, Path) and name != "path"]
        return [*files, *(self.path / name for name in _FOLDERS)]

    def create(self, *, recipe: str | None, environment: dict[str, Any]) -> None:
        """Make the folder and write down what is run where. Raises OSError.

        recipe: None leaves the one that is there, of the training that has ended.
        """
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        if recipe is not None:
            write_text(self.recipe, recipe)
        write_json(self.environment, environment)

    def copy_missing_from(self, checkpoint: Path) -> None:
        """Replace missing files by the copies in the checkpoint from which the run resumes.

        A checkpoint of another run directory starts a branch: its MLflow run is not copied.
        """
        own = checkpoint.absolute().parent == self.checkpoints.absolute()
        for file in self.checkpointed_files:
            if file == self.mlflow and not own:
                continue
            copy = checkpoint / file.name
            if copy.exists() and not file.exists():
                write_text(file, copy.read_text(encoding="utf-8"))

    def read_graph_share(self) -> float | None:
        """The share of the videos that DALI decodes beside PyAV, measured at the first start of the run; None
        where it was not measured or cannot be read.
        """
        share = read_json(self.decoding).get("graph_share")
        return share if isinstance(share, float) and 0 <= share <= 1 else None

    def write_graph_share(self, share: float) -> None:
        """Raises RunError where it cannot be written: the next attempt would use another share."""
        try:
            write_json(self.decoding, {"graph_share": share})
        except OSError as error:
            raise RunError(f"{self.decoding} cannot be written: {error.strerror or error}") from error

    def read_skipped_steps(self, settings: dict[str, Any]) -> int:
        """Steps that all starts with these settings have left out; 0 where it cannot be read."""
        stored = read_json(self.skipped)
        count = stored.get("count") if stored.get("settings") == _digest(settings) else 0
        return count if type(count) is int and count >= 0 else 0

    def write_skipped_steps(self, count: int, settings: dict[str, Any]) -> None:
        with self.best_effort(self.skipped):
            write_json(self.skipped, {"count": count, "settings": _digest(settings)})

    def read_latest_events(self) -> list[dict[str, Any]]:
        """The last of the events, oldest first; a run may have millions."""
        if not self.events.exists():
            return []
        with open(self.events, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            return list(parse_records(file.read().decode(errors="replace")))

    def find_last_event(self, *kinds: str) -> dict[str, Any] | None:
        """The last event of one of these kinds, if it is among the latest."""
        return next(
            (event for event in reversed(self.read_latest_events()) if event.get("event") in kinds), None
        )

    def read_last_spent(self) -> tuple[float, float | None]:
        """Seconds that the run had spent at the last step in the events, 0 without one, and its seconds on
        all devices, None where these were not recorded.
        """
        event = self.find_last_event("step")
        if event is None:
            return 0.0, None
        return max(find_number(event, "spent") or 0.0, 0.0), find_number(event, "device_seconds")

    def find_longest_save(self) -> float:
        """Seconds of the slowest save among the latest events; 0 where there is none."""
        saves = [event for event in self.read_latest_events() if event.get("event") == "checkpoint"]
        return max([0.0, *(find_number(event, "seconds") or 0.0 for event in saves)])

    def append_event(self, kind: str, **values: Any) -> None:
        """Append one line to the events, with the time in seconds since 1970; a full disk loses it."""
        with self.best_effort(self.events):
            append_lines(self.events, [{"event": kind, "time": round(time.time(), 3), **values}])

    def read_quarantined(self) -> set[tuple[str, int]]:
        """Path and manifest row of the videos in quarantine so far."""
        if not self.quarantine.exists():
            return set()
        # A line cut off by a crash, or damaged, is missing here: its video is written down again.
        text = self.quarantine.read_text(encoding="utf-8", errors="replace")
        return {_video(entry) for entry in parse_records(text) if _is_video(entry)}

    def add_to_quarantine(self, entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Append videos, each with `path`, `sample` and `reason`; returns those that were not there yet.

        After a full disk they are written with the next ones.
        """
        owed = {_video(entry) for entry in self._owed}
        unique = {_video(entry): entry for entry in entries}
        fresh = [entry for key, entry in unique.items() if key not in owed]
        with self.best_effort(self.quarantine):
            known = self.read_quarantined()
            fresh = [entry for entry in fresh if _video(entry) not in known]
            self._owed += fresh
            append_lines(self.quarantine, self._owed)
            self._owed = []
        return fresh


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _is_video(entry: dict[str, Any]) -> bool:
    return isinstance(entry.get("path"), str) and type(entry.get("sample")) is int


def _video(entry: dict[str, Any]) -> tuple[str, int]:
    return entry["path"], entry["sample"]


def is_run_dir(path: Path) -> bool:
    """Whether a folder is a run directory: training wrote into it, or a job was submitted for it."""
    return any(os.path.exists(path / mark) for mark in _MARKS)


def find_run_dirs(folder: Path) -> list[Path]:
    """The run directories that a folder names: itself, or those in it and, as in a sweep, one level deeper.

    Numbers in names sort by value (2 before 10). Hidden folders in it and those that cannot be read are left
    out. Raises RunError where `folder` itself cannot be read.
    """
    if is_run_dir(folder):
        return [folder]
    try:
        os.stat(os.path.join(folder, "."))  # fails without the permission to open what is in it
        inside = _folders_in(folder)
    except OSError as error:
        raise RunError(f"{folder} cannot be read: {error.strerror or error}") from error
    found: list[Path] = []
    for path in inside:
        with suppress(OSError):  # another user's, or deleted meanwhile
            candidates = [path] if is_run_dir(path) else _folders_in(path)
            found += [each for each in candidates if is_run_dir(each)]
    return found


def _folders_in(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    return [folder / name for name in sorted(names, key=_by_number)]


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(part or 0), rest) for part, rest in re.findall(r"(\d*)(\D*)", name)]
