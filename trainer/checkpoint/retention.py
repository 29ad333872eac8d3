"""The folder that holds a run's checkpoints: which there are, which stay, and room for the next. Rank 0's
work.
"""

import errno
import json
import logging
import math
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from trainer.checkpoint.accuracies import Accuracies
from trainer.system.files import BestEffort, write_json

_WITHDRAWN = "not-finite-"
_CUT_OFF = (".step-*", f".{_WITHDRAWN}step-*", ".*.json.partial")
MARGIN = 2**26  # bytes left free on the disk beside a checkpoint, for logs and what others write

_log = logging.getLogger(__name__)


class Retention:
    """folder: holds `step-0000123/`, .... keep_last: how many stay. keep_best: whether the most accurate one
    stays beside them.
    """

    def __init__(self, folder: Path, *, keep_last: int, keep_best: bool) -> None:
        self.folder = folder
        self._keep_last = keep_last
        self._keep_best = keep_best
        self._accuracies = Accuracies(folder)
        self._deleting: threading.Thread | None = None
        self._good: Path | None = None  # the newest known to be good, which stays whatever happens
        self._confirmations = folder / "confirmed.json"
        self._telling = BestEffort()
        self._unconfirmed: list[Path] = []  # at whose weights nothing was finite yet

    def visible(self) -> list[Path]:
        """Checkpoints that were made visible, oldest first; a copy under a name of its own is none."""
        folders = (path for path in self.folder.glob("step-*") if path.is_dir())
        return sorted((path for path in folders if step_of(path) >= 0), key=step_of)

    def final(self, step: int) -> Path:
        return self.folder / f"step-{step:07d}"

    def partial(self, step: int) -> Path:
        """Where a checkpoint is written before it is made visible."""
        return self.folder / f".step-{step:07d}.partial"

    def record_accuracy(self, step: int, top1: float) -> None:
        """Write down what the weights after so many steps came to, whether or not there is a checkpoint of
        them.
        """
        self._accuracies.note(step, top1)

    def accuracies(self) -> dict[int, float]:
        """Top-1 (0..1) of all evaluations, by the steps done before; whether or not there is a checkpoint."""
        return self._accuracies.known()

    def highest(self) -> float | None:
        """Top-1 of the most accurate evaluation, whether or not there is a checkpoint of it; None where
        nothing was evaluated.
        """
        return max(filter(math.isfinite, self.accuracies().values()), default=None)

    def best(self) -> tuple[Path, float] | None:
        """The most accurate checkpoint, of several the first, and its top-1; None where none has one."""
        known = self._accuracies.known()
        accuracies = {path: known[step] for path in self.visible() if (step := step_of(path)) in known}
        if not accuracies:
            return None
        best = max(accuracies, key=accuracies.__getitem__)
        return best, accuracies[best]

    def free_space(self, step: int, size: int) -> str | None:
        """Make the hidden folder, and room for `size` bytes, by deleting older checkpoints if it must be.

        Returns why that cannot be. The newest good checkpoint stays whatever happens.
        """
        self.finish_deleting()
        partial, need = self.partial(step), size + MARGIN
        try:
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
            for old in self._dispensable():
                if shutil.disk_usage(self.folder).free >= need:
                    break
                _log.warning("%s is deleted: the disk has no room for the next checkpoint beside it", old)
                _delete([old])
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            return f"{partial}: {error.strerror or error}"
        if free < need:
            return f"it needs {need / 2**30:.2f} GiB in {self.folder}, where {free / 2**30:.2f} GiB are free"
        return None

    def delete_one(self) -> bool:
        """Delete the checkpoint that is missed least, where a quota lets no more be written than the disk has
        room for. Returns whether there was one.
        """
        self.finish_deleting()
        old = next(iter(self._dispensable()), None)
        if old is None:
            return False
        _log.warning("%s is deleted: there is no room to write the next checkpoint beside it", old)
        return _delete([old])

    def replace(self, final: Path) -> None:
        """Clear the place of a checkpoint of the same step that was passed over."""
        if final.exists():
            _delete([final])

    def discard(self, step: int) -> None:
        """Remove what was written of a checkpoint that is given up."""
        shutil.rmtree(self.partial(step), ignore_errors=True)

    def published(self, path: Path) -> None:
        """Take note of a new checkpoint, which may still turn out to be of weights that nobody can use."""
        self._unconfirmed.append(path)

    def confirmed(self, step: int) -> None:
        """Take note that weights were good after `step` steps, and delete in the background what is not to be
        kept beside their checkpoints.
        """
        good = [path for path in self._unconfirmed if step_of(path) <= step]
        if not good:
            return
        self.finish_deleting()
        self._unconfirmed = [path for path in self._unconfirmed if path not in good]
        for path in good:
            if (aside := _withdrawn(path)).exists() and not path.exists():
                _rename(aside, path)
        self._good = good[-1]
        self._write_confirmed(step_of(self._good))
        kept = self._kept_as_best()
        so_far = [path for path in self.visible() if step_of(path) <= step_of(self._good)]
        superfluous = [path for path in so_far[: -self._keep_last] if path != kept]
        superfluous += [path for path in self.withdrawn() if _step_withdrawn(path) <= step_of(self._good)]
        self._deleting = threading.Thread(target=_delete, args=(superfluous,), daemon=True)
        self._deleting.start()

    def withdraw(self, step: int, reason: str) -> bool:
        """Rename the checkpoints of later steps than `step` that were not confirmed, so that no start goes on
        from them. Confirmed later, they get their names back. Returns whether there was one.
        """
        withdrawn = False
        for path in self._unconfirmed:
            if step_of(path) > step and path.exists() and (aside := _rename(path, _withdrawn(path))):
                _log.warning("checkpoint %s is renamed to %s: %s", path, aside.name, reason)
                withdrawn = True
        return withdrawn

    def finish_deleting(self) -> None:
        """Wait for what is being deleted."""
        if self._deleting is not None:
            self._deleting.join()
            self._deleting = None

    def clean_up(self, step: int, good: Path | None = None) -> None:
        """Before a run goes on after `step`: remove what was cut off, set aside what is later.

        good: the checkpoint that it goes on from, which may lie elsewhere. A later one belongs to a branch
        that is given up, or is damaged; left in place, it would count as the newest. Raises OSError.
        """
        for cut_off in (path for kind in _CUT_OFF for path in self.folder.glob(kind)):
            if cut_off.suffix == ".partial":
                _log.warning("%s was cut off while it was written: removed", cut_off.name)
            _remove(cut_off)
        for path in self.visible():
            if step_of(path) > step:
                aside = path.with_name(f"set-aside-{path.name}-{time.strftime('%Y%m%d-%H%M%S')}")
                _log.warning("%s lies after the step the run goes on from: renamed to %s", path, aside.name)
                path.rename(aside)
        self._accuracies.forget_after(step)
        own = [path for path in self.visible() if good is not None and path.resolve() == good.resolve()]
        self._good = own[0] if own else None
        # Of the checkpoints of one branch only the newest can lack it: none is saved before a finite step.
        before = [step_of(path) for path in self.visible() if step_of(path) < step]
        confirmed = max(min(self._read_confirmed(), step), *before, -1)
        self._write_confirmed(confirmed)
        self._unconfirmed = [path for path in own if step_of(path) > confirmed]
        for path in self.withdrawn():
            _log.warning(
                "%s is of weights at which nothing was finite; --resume goes on from it all the same", path
            )

    def withdrawn(self) -> list[Path]:
        """Checkpoints that were renamed, because nothing was finite at their weights, oldest first."""
        folders = (path for path in self.folder.glob(f"{_WITHDRAWN}step-*") if _step_withdrawn(path) >= 0)
        return sorted(folders, key=_step_withdrawn)

    def _read_confirmed(self) -> int:
        """The newest step whose checkpoint was confirmed, in whatever start; -1 where that is not known."""
        try:
            step = json.loads(self._confirmations.read_text(encoding="utf-8"))["step"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return -1
        return step if type(step) is int else -1

    def _write_confirmed(self, step: int) -> None:
        if step == self._read_confirmed():
            return
        with self._telling(self._confirmations):
            write_json(self._confirmations, {"step": step})

    def _dispensable(self) -> list[Path]:
        """What may be deleted for want of room, in this order: what was withdrawn, the others, the most
        accurate last, the newest good one never.
        """
        kept = self._kept_as_best()
        visible = self.visible()
        stays = self._good or (visible[-1] if visible else None)
        return self.withdrawn() + sorted(
            (path for path in visible if path != stays), key=lambda path: (path == kept, step_of(path))
        )

    def _kept_as_best(self) -> Path | None:
        best = self.best() if self._keep_best else None
        return None if best is None else best[0]


def step_of(path: Path) -> int:
    """The step whose checkpoint lies there; -1 for a folder that is named otherwise."""
    number = path.name.removeprefix("step-")
    return int(number) if number.isascii() and number.isdigit() else -1


def _remove(path: Path) -> None:
    """Remove a folder, or a link: what lies behind it is not this run's to delete. Raises OSError."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path)


def _step_withdrawn(path: Path) -> int:
    return step_of(path.with_name(path.name.removeprefix(_WITHDRAWN)))


def _withdrawn(path: Path) -> Path:
    return path.with_name(_WITHDRAWN + path.name)


def _rename(path: Path, new: Path) -> Path | None:
    """The new path; None where it cannot be, which is said."""
    try:
        if new.exists():
            _remove(new)
        return path.rename(new)
    except OSError as error:
        _log.warning("%s cannot be renamed to %s (%s)", path, new.name, error)
        return None


def is_disk_full(error: Exception) -> bool:
    """Whether writing failed because the disk or a quota is used up."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _delete(paths: Sequence[Path]) -> bool:
    """Hidden first: what is visible is whole, even while it is deleted. Returns whether all are gone."""
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
