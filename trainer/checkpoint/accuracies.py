"""How accurate a run was, by step: `checkpoints/accuracy.json`."""

import json
from pathlib import Path

from trainer.system.files import BestEffort, write_text


class Accuracies:
    """folder: of a run's checkpoints. The file only says which of them to keep, and what to show."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "accuracy.json"
        self._unwritten: dict[int, float] = {}
        self._telling = BestEffort()

    def known(self) -> dict[int, float]:
        """Top-1 (0..1) by the steps done before it was measured; nothing where the file is missing or
        damaged.
        """
        return {**self._written(), **self._unwritten}

    def note(self, step: int, top1: float) -> None:
        """Remember it, and write it down as soon as the disk lets it."""
        self._unwritten[step] = top1
        with self._telling(self._path):
            self._write(self.known())
            self._unwritten.clear()

    def forget_after(self, step: int) -> None:
        """Drop what belongs to a branch that is given up. Raises OSError."""
        if self._path.exists():
            self._write({done: top1 for done, top1 in self.known().items() if done <= step})

    def _written(self) -> dict[int, float]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            return {int(step): float(top1) for step, top1 in found.items()}
        except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            return {}

    def _write(self, accuracies: dict[int, float]) -> None:
        write_text(self._path, json.dumps({str(step): top1 for step, top1 in accuracies.items()}) + "\n")
