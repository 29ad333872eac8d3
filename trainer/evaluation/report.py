"""The result of an evaluation as files and as a table."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.formatting import printable
from trainer.distributed.environment import Environment
from trainer.evaluation.confusion_matrix import draw_confusion
from trainer.evaluation.evaluation_dir import EvaluationDir
from trainer.evaluation.metrics import mean_class_accuracy, most_confused, per_class, reliability
from trainer.evaluation.multi_view import EvaluationResult
from trainer.evaluation.target import EvaluationTarget
from trainer.monitoring.console import facts_table, print_unwrapped
from trainer.system.files import write_json, write_text
from trainer.system.formatting import format_duration, format_percent

NAMED = 10
"""Number of bad videos that a message names."""


def write_report(
    folder: EvaluationDir,
    target: EvaluationTarget,
    identity: dict[str, Any],
    result: EvaluationResult,
    environment: Environment,
    *,
    videos: int,
    seconds: float,
) -> None:
    """Write all files except the scores. `evaluation.json` is last: it marks the evaluation as finished.

    videos, seconds: work of this start. Raises OSError.
    """
    names = [printable(name) for name in target.names]
    classes = per_class(result.confusion)
    pairs = most_confused(result.confusion)
    _write_rows(
        folder.path / "per_class.csv",
        ("label", "class", "videos", "correct", "accuracy", "predicted"),
        (
            (c.label, names[c.label], c.videos, c.correct, c.accuracy if c.videos else None, c.predicted)
            for c in classes
        ),
    )
    confusion = result.confusion
    cells = ((true, wrong, int(confusion[true, wrong])) for true, wrong in confusion.nonzero().tolist())
    _write_rows(folder.path / "confusion.csv", ("true", "predicted", "videos"), cells)
    _write_rows(folder.path / "bad_videos.csv", ("row", "path", "reason"), folder.bad_videos())
    title = f"{target.manifest.name}, top-1 {100 * result.top1:.1f} %"
    draw_confusion(folder.path / "confusion.png", result.confusion, names, title)
    views = target.view.views
    values = {
        "source": str(target.source),
        "step": target.weights.step,
        "manifest": str(target.manifest),
        **identity,
        "frames": target.view.frames,
        "resolution": target.view.size,
        "device": environment.device.type,
        "ranks": environment.world_size,
        "batch": target.batch,
        "top1": result.top1,
        "top5": result.top5,
        "mean_class_accuracy": mean_class_accuracy(classes),
        "loss": result.loss,
        "ece": result.ece,
        "videos": result.videos,
        "bad": result.bad,
        "last_start": {
            "videos": videos,
            "seconds": round(seconds, 3),
            "clips_per_second": round(videos * views / seconds, 3) if seconds else None,
        },
        "bad_videos": [
            {"row": row, "path": path, "reason": reason}
            for row, path, reason in islice(folder.bad_videos(), NAMED)
        ],
        "most_confused": [
            {**asdict(pair), "true": names[pair.true], "predicted": names[pair.predicted]} for pair in pairs
        ],
        "reliability": [asdict(part) for part in reliability(result.bins)],
        "per_class": [
            {"class": names[c.label], "videos": c.videos, "correct": c.correct, "accuracy": c.accuracy}
            for c in classes
        ],
    }
    write_json(folder.result, values)


def print_result(folder: EvaluationDir, *, as_json: bool) -> None:
    """Print `evaluation.json`, or its main numbers as a table."""
    text = folder.result.read_text(encoding="utf-8")
    if as_json:
        print(text, end="")
        return
    print_unwrapped(Console(highlight=False), _table(json.loads(text), folder.path))


def _table(values: dict[str, Any], path: Path) -> Table:
    table = facts_table()
    for label, name in (("top-1", "top1"), ("top-5", "top5"), ("mean class", "mean_class_accuracy")):
        table.add_row(label, _percent(values[name]))
    table.add_row("ECE", _percent(values["ece"]))
    table.add_row("loss", "-" if values["loss"] is None else f"{values['loss']:.4f}")
    table.add_row("videos", f"{values['videos']:,} (clips x crops: {values['clips']} x {values['crops']})")
    table.add_row("bad", f"{values['bad']:,}")
    for video in values["bad_videos"]:
        table.add_row("", f"{video['path']} {video['reason']}")
    for pair in values["most_confused"][:3]:
        videos = f"{pair['videos']} video{'s' * (pair['videos'] > 1)}, {format_percent(pair['share'], 0)}"
        table.add_row("confused", f"{pair['true']} predicted as {pair['predicted']}: {videos}")
    start = values["last_start"]
    if start["clips_per_second"] is not None:
        table.add_row("time", f"{format_duration(start['seconds'])}, {start['clips_per_second']:.1f} clips/s")
    step = "" if values["step"] is None else f", step {values['step']}"
    table.add_row("weights", f"{values['source']}{step}")
    table.add_row("manifest", values["manifest"])
    table.add_row("results", str(path))
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else format_percent(value)


def _write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())
