"""Where a run is tracked: `mlflow_run.json` in its folder."""

import json
import logging
import os
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from trainer.system.files import write_text
from trainer.system.secrets import Address

NAME = "mlflow_run.json"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunReference:
    """Where a run is tracked, and as which of MLflow's runs."""

    uri: str
    """MLflow's address, without user name and password."""
    experiment: str
    run_name: str
    started: int
    """First start of the run, milliseconds since 1970."""
    key: str
    """Our own name for the run, a tag on it: finds a run whose creation was cut off before the id came."""
    experiment_id: str | None = None
    run_id: str | None = None
    parent: str | None = None
    """MLflow's id of the run that this one stands under."""
    folder: str = ""
    """The run's, when it was last tracked: a copy of it is another run; one that was moved is not."""
    credentials: bool = False
    """Whether the address had a user name and a password: they are not kept, and have to be given again."""

    base: int = 0
    """Bytes of the spool that were recorded before MLflow's run began; see `RepeatedSteps`."""

    @classmethod
    def read(cls, run_dir: Path) -> "RunReference | None":
        """None where the run was never tracked. In place of a damaged file, the newest checkpoint's copy.

        Only reads. Raises OSError where the file cannot be read.
        """
        try:
            return _read(run_dir / NAME)
        except _Damaged:
            return _newest_copy(run_dir)

    @classmethod
    def recover(cls, run_dir: Path) -> "RunReference | None":
        """As `load`, and sets a damaged file aside, with the checkpoint's copy written in its place.

        For a process that tracks or delivers the run. Raises OSError where that cannot be done.
        """
        path = run_dir / NAME
        try:
            return _read(path)
        except _Damaged:
            found = _newest_copy(run_dir)
            aside = path.with_name(f"{NAME}.damaged-{datetime.now():%Y%m%d-%H%M%S-%f}")
            os.replace(path, aside)
            if found is not None:
                found.write(run_dir)
            _log.warning(
                "%s is damaged, and now %s; %s",
                path,
                aside.name,
                "the run's history goes to a new MLflow run"
                if found is None
                else "a checkpoint's copy is taken",
            )
            return found

    def write(self, run_dir: Path) -> None:
        write_text(run_dir / NAME, json.dumps(asdict(self), indent=2) + "\n", sync=False, shared=True)

    def for_new_run(self, base: int) -> "RunReference":
        """The same place for a new MLflow run."""
        return replace(self, key=uuid.uuid4().hex, run_id=None, experiment_id=None, base=base)


class _Damaged(Exception):
    """The file does not say where a run is tracked."""


def _newest_copy(run_dir: Path) -> RunReference | None:
    for copy in sorted(run_dir.glob(f"checkpoints/step-*/{NAME}"), reverse=True):
        with suppress(OSError, _Damaged):
            if (found := _read(copy)) is not None:
                return found
    return None


def _read(path: Path) -> RunReference | None:
    """None where there is no file. Raises _Damaged, or OSError where it cannot be read."""
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name: values[field.name] for field in fields(RunReference) if field.name in values}
        reference = RunReference(**known)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (IsADirectoryError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise _Damaged from error
    texts = (reference.uri, reference.experiment, reference.run_name, reference.key, reference.folder)
    optional = (reference.experiment_id, reference.run_id, reference.parent)
    is_sound = (
        all(isinstance(text, str) for text in texts)
        and all(text is None or isinstance(text, str) for text in optional)
        and isinstance(reference.started, int)
        and isinstance(reference.base, int)
        and reference.uri != ""
    )
    if not is_sound:
        raise _Damaged
    # Written before addresses were kept without their passwords.
    address = Address(reference.uri)
    return replace(
        reference, uri=str(address), credentials=reference.credentials is True or address.has_credentials
    )
