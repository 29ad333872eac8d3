"""Where a run is tracked: `mlflow_run.json` in its folder."""

import json
import logging
import os
import time
import uuid
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from trainer.tracking.secrets import Address
from trainer.tracking.spool import replace_text

NAME = "mlflow_run.json"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
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
    """Bytes of the spool that were recorded before MLflow's run began; see `Repeats`."""

    @classmethod
    def load(cls, run_dir: Path) -> "Place | None":
        """None where the run was never tracked. Sets a damaged file aside, for a checkpoint's copy."""
        path = run_dir / NAME
        found = _read(path)
        if found is None and path.exists():
            aside = path.with_name(f"{NAME}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
            os.replace(path, aside)
            copies = sorted(run_dir.glob(f"checkpoints/step-*/{NAME}"), reverse=True)
            found = next((copy for copy in map(_read, copies) if copy is not None), None)
            _log.warning(
                "%s is damaged, and now %s; %s",
                path,
                aside.name,
                "the run's history goes to a new MLflow run"
                if found is None
                else "a checkpoint's copy is taken",
            )
        return found

    def save(self, run_dir: Path) -> None:
        replace_text(run_dir / NAME, json.dumps(asdict(self), indent=2) + "\n")

    def anew(self, base: int) -> "Place":
        """The same place for a new MLflow run."""
        return replace(self, key=uuid.uuid4().hex, run_id=None, experiment_id=None, base=base)


def _read(path: Path) -> Place | None:
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name: values[field.name] for field in fields(Place) if field.name in values}
        place = Place(**known)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    texts = (place.uri, place.experiment, place.run_name, place.key, place.folder)
    optional = (place.experiment_id, place.run_id, place.parent)
    is_sound = (
        all(isinstance(text, str) for text in texts)
        and all(text is None or isinstance(text, str) for text in optional)
        and isinstance(place.started, int)
        and isinstance(place.base, int)
        and place.uri != ""
    )
    if not is_sound:
        return None
    # Written before addresses were kept without their passwords.
    address = Address(place.uri)
    return replace(place, uri=str(address), credentials=place.credentials is True or address.has_credentials)
