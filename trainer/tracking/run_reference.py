"""The MLflow run of a run directory: `mlflow_run.json`."""

import json
import logging
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from trainer.secrets import Address
from trainer.system.files import write_text
from trainer.tracking.outbox import Outbox

NAME = "mlflow_run.json"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunReference:
    """The MLflow run that a run directory belongs to."""

    uri: str
    """MLflow's address, without user name and password."""
    experiment: str
    run_name: str
    started: Annotated[int, Field(strict=True)]
    """First start of the run, milliseconds since 1970."""
    key: str
    """A tag of the MLflow run. It finds the run if the process died before it received the run's id."""
    experiment_id: str | None = None
    run_id: str | None = None
    parent: str | None = None
    """Id of the parent MLflow run."""
    folder: str = ""
    """The run directory at the last start: a copy of it is another run, a moved one is the same run."""
    credentials: bool = False
    """Whether the address had a user name and a password, which are not stored: each start needs them."""
    base: Annotated[int, Field(strict=True)] = 0
    """Size of the outbox in bytes when the MLflow run began; see `RepeatedSteps`."""

    @classmethod
    def read(cls, run_dir: Path) -> "RunReference | None":
        """None if the run was never tracked. For a damaged file, the copy in the newest checkpoint.

        Changes nothing. Raises OSError if the file cannot be read.
        """
        try:
            return _read(run_dir / NAME)
        except _Damaged:
            return _newest_copy(run_dir)

    @classmethod
    def recover(cls, run_dir: Path) -> "RunReference | None":
        """Like `read`, but renames a damaged file and writes the checkpoint's copy under its name.

        For a process that tracks or uploads the run. Raises OSError.
        """
        path = run_dir / NAME
        try:
            return _read(path)
        except _Damaged:
            found = _newest_copy(run_dir)
            damaged = path.with_name(f"{NAME}.damaged-{datetime.now():%Y%m%d-%H%M%S-%f}")
            os.replace(path, damaged)
            if found is not None:
                found.write(run_dir)
            _log.warning(
                "%s is damaged and was renamed to %s; %s",
                path,
                damaged.name,
                "the run's history is uploaded to a new MLflow run"
                if found is None
                else "the copy in a checkpoint is used",
            )
            return found

    def write(self, run_dir: Path) -> None:
        write_text(run_dir / NAME, json.dumps(asdict(self), indent=2) + "\n", sync=False, shared=True)


class _Damaged(Exception):
    """The content of the file is invalid."""


def _newest_copy(run_dir: Path) -> RunReference | None:
    for copy in sorted(run_dir.glob(f"checkpoints/step-*/{NAME}"), reverse=True):
        with suppress(OSError, _Damaged):
            if (found := _read(copy)) is not None:
                return found
    return None


def _read(path: Path) -> RunReference | None:
    """None if there is no file. Raises _Damaged, or OSError if it cannot be read."""
    try:
        reference = TypeAdapter(RunReference).validate_python(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (IsADirectoryError, ValueError, RecursionError) as error:
        raise _Damaged from error
    if not reference.uri:
        raise _Damaged
    # Files of earlier versions hold addresses with passwords.
    address = Address(reference.uri)
    return replace(reference, uri=str(address), credentials=reference.credentials or address.has_credentials)


def archive_tracking(run_dir: Path) -> Path | None:
    """Move the outbox and the run reference to a subfolder, so that the next start creates an MLflow run.

    Parameters of an MLflow run never change: a training with other parameters needs a run of its own. Records
    that are not uploaded can be uploaded with launch/deliver.py and the subfolder. Returns the subfolder;
    None if the run was not tracked. Raises OSError.
    """
    outbox = Outbox(run_dir)
    if not (run_dir / NAME).exists():
        return None
    folder = run_dir / f"mlflow-{time.strftime('%Y%m%d-%H%M%S')}"
    folder.mkdir()
    for path in (*outbox.paths, run_dir / NAME):  # the reference last: until then the run continues with it
        if path.exists():
            os.replace(path, folder / path.name)
    return folder
