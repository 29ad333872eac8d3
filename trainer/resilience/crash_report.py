"""Crash reports: a rank that fails writes when, where and why, so that the first failure is found.

The error files of torch.distributed.elastic would not do: only torchrun sets their path, and they hold no
host and no fraction of a second, without which the first failure cannot be found.
"""

import json
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.secrets import redacted
from trainer.system.files import read_json

if TYPE_CHECKING:  # it imports torch, which a reader does not need
    from trainer.distributed.environment import Environment


def write_crash_report(run_dir: Path, environment: "Environment", error: BaseException) -> None:
    """Write `failures/rank-00003.json` into the run directory. Raises nothing: the error matters more."""
    report = {
        "time": round(time.time(), 3),
        "rank": environment.rank,
        "node": environment.node,
        "words": redacted(f"{type(error).__name__}: {error}"),
        "traceback": redacted("".join(traceback.format_exception(error))),
    }
    with suppress(OSError):
        folder = run_dir / "failures"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank-{environment.rank:05d}.json"
        path.write_text(json.dumps(report) + "\n", encoding="utf-8")


def first_crash_report(run_dir: Path, since: float) -> str | None:
    """The earliest crash report since then (seconds since 1970), with its traceback; None without any."""
    reports = []
    for path in (run_dir / "failures").glob("rank-*.json"):
        report = read_json(path)  # empty where its rank was killed while it wrote
        if report.keys() >= {"time", "rank", "node", "words", "traceback"} and report["time"] >= since:
            reports.append(report)
    if not reports:
        return None
    first = min(reports, key=lambda report: report["time"])
    others = f" ({len(reports) - 1} more failed after it)" if len(reports) > 1 else ""
    rank = f"rank {first['rank']} on {first['node']}"
    return f"{rank} failed first{others}: {first['words']}\n{first['traceback'].rstrip()}"
