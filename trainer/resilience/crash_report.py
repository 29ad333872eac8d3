"""A note of what a rank failed by, so that of a thousand logs the one that matters is found."""

import json
import time
import traceback
from contextlib import suppress
from pathlib import Path

from trainer.distributed.environment import Environment
from trainer.system.secrets import redacted


def write_crash_report(run_dir: Path, environment: Environment, error: BaseException) -> None:
    """Write `failures/rank-00003.json` into the run's folder: when, where, and what. Raises nothing: what
    failed already is to be told, not that it could not be written down.
    """
    note = {
        "time": round(time.time(), 3),
        "rank": environment.rank,
        "node": environment.node,
        "words": redacted(f"{type(error).__name__}: {error}"),
        "traceback": redacted("".join(traceback.format_exception(error))),
    }
    with suppress(OSError):
        folder = run_dir / "failures"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank-{environment.rank:05d}.json").write_text(json.dumps(note) + "\n", encoding="utf-8")
