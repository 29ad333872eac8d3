"""Which checkpoints of a run are kept, withdrawn and deleted. Only rank 0 changes the folder."""

import errno
import json
import logging
import math
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.system.files import BestEffort, read_json, write_json, write_text

_WITHDRAWN = "not-finite-"
_CUT_OFF = (".step-*", f".{_WITHDRAWN}step-*", ".*.json.partial")
_ACCURACIES = "accuracy.json"
MARGIN = 2**26  # bytes left free on the disk beside a checkpoint, for logs and other programs

_log = logging.getLogger(__name__)


def read_accuracies(folder: Path) -> dict[int, float]:
    """Top-1 (0..1) of a run's evaluations by the steps done; empty where the file is missing or damaged.

    folder: of the run's checkpoints.
    """
    try:
        return {int(step): float(top1) for step, top1 in read_json(folder / _ACCURACIES).items()}
    except (ValueError, TypeError, OverflowError):
        return {}


@dataclass
class Retention:
    """The folder of a run's checkpoints.

    `step-0000123/` is a complete checkpoint, `.step-0000123.partial/` one that is being written, and
    `not-finite-step-0000123/` a withdrawn one.
    """

    folder: Path
    keep_last: int = 1
    """How many of the newest are kept."""
    keep_best: bool = True
    """Whether the most accurate one is kept as well."""

    def __post_init__(self) -> None:
        self._unwritten: dict[int, float] = {}  # accuracies that are not in the file
        self._deleting: threading.Thread | None = None
        self._good: Path | None = None  # the newest that is known to be good: never deleted
        self._confirmations = self.folder / "confirmed.json"
        self._best_effort = BestEffort()
        self._unconfirmed: list[Path] = []  # saved by this attempt, or resumed from

    def visible(self) -> list[Path]:
        """The complete checkpoints, oldest first; folders with other names are ignored."""
        return self._folders("step-*")

    def withdrawn(self) -> list[Path]:
        """The withdrawn checkpoints, oldest first."""
        return self._folders(f"{_WITHDRAWN}step-*")

    def _folders(self, pattern: str) -> list[Path]:
        folders = (path for path in self.folder.glob(pattern) if path.is_dir() and step_of(path) >= 0)
        return sorted(folders, key=step_of)

    def path_of(self, step: int) -> Path:
        """The folder of a complete checkpoint."""
        return self.folder / f"step-{step:07d}"

    def partial_path(self, step: int) -> Path:
        """The folder of a checkpoint that is being written."""
        return self.folder / f".step-{step:07d}.partial"

    def record_accuracy(self, step: int, top1: float) -> None:
        """Record an evaluation, whether or not its step has a checkpoint. A full disk delays the file."""
        self._unwritten[step] = top1
        with self._best_effort(self.folder / _ACCURACIES):
            self._write_accuracies(self.accuracies())
            self._unwritten.clear()

    def accuracies(self) -> dict[int, float]:
        """Top-1 (0..1) of all evaluations by the steps done, whether or not there is a checkpoint."""
        return {**read_accuracies(self.folder), **self._unwritten}

    def highest(self) -> float | None:
        """Top-1 of the most accurate evaluation; None where there was none."""
        return max(filter(math.isfinite, self.accuracies().values()), default=None)

    def best(self) -> tuple[Path, float] | None:
        """The most accurate checkpoint, of several the first, and its top-1; None without evaluations."""
        known = self.accuracies()
        accuracies = {path: known[step] for path in self.visible() if (step := step_of(path)) in known}
        if not accuracies:
            return None
        best = max(accuracies, key=accuracies.__getitem__)
        return best, accuracies[best]

    def free_space(self, step: int, size: int) -> str | None:
        """Make the partial folder of a step; delete old checkpoints until `size` bytes are free beside the
        margin.

        Returns why that is not possible, or None. The newest good checkpoint is never deleted.
        """
        self.finish_deleting()
        partial, need = self.partial_path(step), size + MARGIN
        try:
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
            for old in self._deletable():
                if shutil.disk_usage(self.folder).free >= need:
                    break
                _log.warning("%s is deleted: the disk has no space for the next checkpoint beside it", old)
                _delete([old])
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            return f"{partial}: {error.strerror or error}"
        if free < need:
            return f"it needs {need / 2**30:.2f} GiB in {self.folder}, where {free / 2**30:.2f} GiB are free"
        return None

    def delete_one(self) -> bool:
        """Delete the lowest-priority checkpoint when a quota is hit before the disk is full. Returns whether
        one was deleted.
        """
        self.finish_deleting()
        old = next(iter(self._deletable()), None)
        if old is None:
            return False
        _log.warning("%s is deleted: there is no space for the next checkpoint beside it", old)
        return _delete([old])

    def replace(self, path: Path) -> None:
        """Delete a damaged checkpoint of a step that is saved again."""
        if path.exists():
            _delete([path])

    def discard(self, step: int) -> None:
        """Delete the partial folder of a step."""
        shutil.rmtree(self.partial_path(step), ignore_errors=True)

    def add_unconfirmed(self, path: Path) -> None:
        """Record a new checkpoint, whose weights are not known to be good."""
        self._unconfirmed.append(path)

    def confirm(self, step: int) -> None:
        """Record that the weights after `step` steps are good, and delete in the background what their
        checkpoint replaces. A withdrawn checkpoint that is good after all gets its name back.
        """
        good = [path for path in self._unconfirmed if step_of(path) <= step]
        if not good:
            return
        self.finish_deleting()
        self._unconfirmed = [path for path in self._unconfirmed if path not in good]
        for path in good:
            if (aside := _withdrawn_path(path)).exists() and not path.exists():
                _rename(aside, path)
        self._good = good[-1]
        newest = step_of(self._good)
        self._write_confirmed(newest)
        best = self._best_to_keep()
        so_far = [path for path in self.visible() if step_of(path) <= newest]
        superfluous = [path for path in so_far[: -self.keep_last] if path != best]
        superfluous += [path for path in self.withdrawn() if step_of(path) <= newest]
        self._deleting = threading.Thread(target=_delete, args=(superfluous,), daemon=True)
        self._deleting.start()

    def withdraw(self, step: int, reason: str) -> bool:
        """Rename the unconfirmed checkpoints of later steps than `step`, so that no attempt resumes from
        them.

        Returns whether there was one.
        """
        withdrawn = False
        for path in self._unconfirmed:
            if step_of(path) > step and path.exists() and (aside := _rename(path, _withdrawn_path(path))):
                _log.warning("checkpoint %s is renamed to %s: %s", path, aside.name, reason)
                withdrawn = True
        return withdrawn

    def finish_deleting(self) -> None:
        """Wait for the deletion in the background."""
        if self._deleting is not None:
            self._deleting.join()
            self._deleting = None

    def clean_up(self, step: int, resumed: Path | None = None) -> None:
        """Before a run starts after `step` steps: delete partial checkpoints and rename later ones.

        A later checkpoint belongs to an abandoned branch or is damaged; it must not count as the newest.

        resumed: the checkpoint that the run resumes from, which may be in another folder. Raises OSError.
        """
        for cut_off in (path for kind in _CUT_OFF for path in self.folder.glob(kind)):
            if cut_off.suffix == ".partial":
                _log.warning("%s was not written completely: removed", cut_off.name)
            _remove(cut_off)
        for path in self.visible():
            if step_of(path) > step:
                aside = path.with_name(f"set-aside-{path.name}-{time.strftime('%Y%m%d-%H%M%S')}")
                _log.warning(
                    "%s is later than the step the run starts after: renamed to %s", path, aside.name
                )
                path.rename(aside)
        if (self.folder / _ACCURACIES).exists():
            self._write_accuracies({done: top1 for done, top1 in self.accuracies().items() if done <= step})
        own = [path for path in self.visible() if resumed is not None and path.resolve() == resumed.resolve()]
        self._good = own[0] if own else None
        # Only the newest of a branch can be unconfirmed: a save needs a finite step before it.
        before = [step_of(path) for path in self.visible() if step_of(path) < step]
        confirmed = max(min(self._read_confirmed(), step), *before, -1)
        self._write_confirmed(confirmed)
        self._unconfirmed = [path for path in own if step_of(path) > confirmed]
        for path in self.withdrawn():
            _log.warning("%s is withdrawn: its weights gave no finite numbers; --resume can name it", path)

    def _write_accuracies(self, accuracies: dict[int, float]) -> None:
        text = json.dumps({str(step): top1 for step, top1 in accuracies.items()})
        write_text(self.folder / _ACCURACIES, text + "\n")

    def _read_confirmed(self) -> int:
        """The newest confirmed step of all attempts; -1 where it is not known."""
        step = read_json(self._confirmations).get("step")
        return step if type(step) is int else -1

    def _write_confirmed(self, step: int) -> None:
        if step == self._read_confirmed():
            return
        with self._best_effort(self._confirmations):
            write_json(self._confirmations, {"step": step})

    def _deletable(self) -> list[Path]:
        """What may be deleted to free space, lowest priority first: withdrawn ones, older ones, the best. The
        newest good one is not among them.
        """
        best, visible = self._best_to_keep(), self.visible()
        newest_good = self._good or (visible[-1] if visible else None)
        return self.withdrawn() + sorted(
            (path for path in visible if path != newest_good), key=lambda path: (path == best, step_of(path))
        )

    def _best_to_keep(self) -> Path | None:
        best = self.best() if self.keep_best else None
        return None if best is None else best[0]


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder, also of a withdrawn one; -1 for other names."""
    number = path.name.removeprefix(_WITHDRAWN).removeprefix("step-")
    return int(number) if number.isascii() and number.isdigit() else -1


def is_disk_full(error: Exception) -> bool:
    """Whether writing failed because the disk or a quota is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _withdrawn_path(path: Path) -> Path:
    return path.with_name(_WITHDRAWN + path.name)


def _remove(path: Path) -> None:
    """Remove a folder, or a link but not its target. Raises OSError."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path)


def _rename(path: Path, new: Path) -> Path | None:
    """The new path; None, with a warning, where renaming fails."""
    try:
        if new.exists():
            _remove(new)
        return path.rename(new)
    except OSError as error:
        _log.warning("%s cannot be renamed to %s (%s)", path, new.name, error)
        return None


def _delete(paths: Sequence[Path]) -> bool:
    """Hide, then remove: a visible checkpoint is complete even while it is deleted. Returns whether all are
    gone.
    """
    gone = True
    for path in paths:
        hidden = path.with_name(f".{path.name}.deleted")
        try:
            path.rename(hidden)
            _remove(hidden)
        except OSError as error:
            _log.warning("%s cannot be deleted (%s)", path, error)
            gone = False
    return gone
