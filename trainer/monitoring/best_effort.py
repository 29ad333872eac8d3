"""Telling how a run goes must not end it: a disk without room costs the words, not the training."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_log = logging.getLogger(__name__)


class BestEffort:
    """Lets files go unwritten, and says so once for each, until it can be written again.

    Rank 0 alone tells: an error of its own would leave the others waiting for it in a collective.

    with best_effort(path):
        path.write_text(...)
    """

    def __init__(self) -> None:
        self._failed: set[Path] = set()

    @contextmanager
    def __call__(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if path not in self._failed:
                _log.warning(
                    "cannot write %s (%s): the run goes on without", path, error.strerror or str(error)
                )
            self._failed.add(path)
        else:
            self._failed.discard(path)
