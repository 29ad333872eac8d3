"""Makes run directories with known numbers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.integration.processes import SMALL
from trainer.config.load import load_recipe
from trainer.config.schema import Recipe

START = 1.7e9


def recipe(path: Path, **changes: Any) -> Recipe:
    """The small recipe, named after the folder; `optimisation__steps=4` changes a field."""
    values = {"name": path.name, "run__dir": str(path.parent), **changes}
    settings = [f"{name.replace('__', '.')}={json.dumps(value)}" for name, value in values.items()]
    return load_recipe(SMALL, settings)


def make_run(
    path: Path,
    *,
    losses: Sequence[float] = (4.0, 2.0, 1.0, 0.5),
    top1: dict[int, float] | None = None,
    end: str = "end",
    train_fingerprint: str | None = "a" * 64,
    val_fingerprint: str | None = "b" * 64,
    world_size: int = 2,
    batch_hashes: Sequence[str] = (),
    scores: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A run of a step per loss, each taking 9 s on every rank.

    top1: by step; top-5 is 0.1 more, the loss 2 less top-1. end: the last event; empty where the run has
    written none. changes: of the recipe.
    """
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text(recipe(path, **changes).to_yaml())
    (path / "environment.json").write_text("{}")
    fingerprints = {"train_fingerprint": train_fingerprint, "val_fingerprint": val_fingerprint}
    known = {name: value for name, value in fingerprints.items() if value is not None}
    steps = len(losses)
    started = {"event": "start", "time": START, "step": 0, "total_steps": 4, "world_size": world_size}
    events: list[dict[str, Any]] = [{**started, **known}]
    for step, loss in enumerate(losses, start=1):
        event = {
            "event": "step", "time": START + 9 * step, "step": step, "total_steps": 4, "starts": 1,
            "loss": loss, "learning_rate": 1e-3, "gradient_norm": 1.0, "clips_per_second": 10.0 + step,
            "data_wait_share": 0.25, "bad_clips": 0, "spent": 9.0 * step,
            "device_seconds": 9.0 * step * world_size, "mfu": 0.3, "quarantined": 1,
        }  # fmt: skip
        if batch_hashes:
            event["batch_hash"] = batch_hashes[step - 1]
        events.append(event)
        if top1 is not None and step in top1:
            found = {"top1": top1[step], "top5": min(1.0, top1[step] + 0.1), "loss": 2.0 - top1[step]}
            events.append(
                {"event": "evaluation", "time": event["time"], "step": step, "videos": 10, "bad": 0, **found}
            )
    if end == "end":
        last = (top1 or {}).get(steps)
        summary = {
            "top1": last, "top5": None, "videos": 10, "bad_videos": 0, "steps": steps,
            "clips_per_second": 12.5, "data_wait_share": 0.2, "seconds": 36.0,
            "gpu_hours": 0.02, "mfu": 0.31, "quarantined": 2,
        }  # fmt: skip
        (path / "summary.json").write_text(json.dumps(summary))
        events.append({"event": "end", "time": START + 9 * steps, **summary})
    elif end:
        events.append(
            {"event": end, "time": START + 9 * steps, "step": steps, "words": "no room", "reason": "STOP"}
        )
    (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if scores is not None:
        write_scores(path / "scores.parquet", **scores)
    return path


def write_scores(
    path: Path,
    *,
    predictions: Sequence[int | None],
    labels: Sequence[int | None],
    paths: Sequence[str] | None = None,
    rows: Sequence[int] | None = None,
    fingerprint: str | None = "b" * 64,
    clips: int = 1,
) -> None:
    """A file of scores of three classes, two videos to a row group."""
    videos = len(predictions)
    values = np.zeros(3 * videos, np.float32)
    bad = np.repeat([prediction is None for prediction in predictions], 3)
    table = pa.table(
        {
            "row": pa.array(rows or range(videos), pa.int64()),
            "path": list(paths or [f"{number}.mp4" for number in range(videos)]),
            "label": pa.array(labels, pa.int32()),
            "prediction": pa.array(predictions, pa.int32()),
            "correct_top5": pa.array([prediction is not None for prediction in predictions]),
            "scores": pa.FixedSizeListArray.from_arrays(pa.array(values, mask=bad), 3),
        }
    )
    about = {"fingerprint": fingerprint, "clips": clips, "crops": 1, "step": 4}
    pq.write_table(
        table.replace_schema_metadata({b"uniformerv2": json.dumps(about).encode()}), path, row_group_size=2
    )
