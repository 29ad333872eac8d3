"""Replay of a nonfinite step: its clips and weights are written to safetensors files and run again."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, TypeAdapter
from rich.console import Console
from rich.table import Table
from torch import Tensor

from models import ModelError, UniFormerV2, UniFormerV2Config
from models.weights.files import StoredWeights, open_safetensors
from models.weights.safetensors_header import WeightFileError
from pipelines.augment.mixing import MixedLabels
from pipelines.formatting import printable
from pipelines.loader import ClipBatch
from trainer.checkpoint.shards import Count, dtype_name
from trainer.checkpoint.tensor_file import write_tensors
from trainer.checkpoint.weights import load_weights
from trainer.errors import RunError
from trainer.loss import masked_cross_entropy
from trainer.resilience.nan_tracer import NonfiniteTrace, trace_nonfinite
from trainer.system.device import Precision

FORMAT = "not-finite 1"
WEIGHTS = "weights.safetensors"
_OF_EACH_CLIP = {"labels": torch.int64, "ids": torch.int64, "valid": torch.bool, "keys": torch.int64}
_OF_EACH_MIXED_CLIP = {"mixed_labels": torch.int64, "mixed_weights": torch.float32}
_AROUND = 6  # modules printed before and after the first that is not finite


@dataclass(frozen=True)
class BatchOrigin:
    """Where a replayed micro-batch comes from."""

    step: Count
    """Counted from 1."""
    rank: Count
    micro_batch: Count
    """Counted from 0."""
    precision: Precision
    words: str
    """The reason for the replay."""
    paths: Annotated[list[str], Field(min_length=1)]
    """The clips' videos."""
    label_smoothing: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.0
    """Of the loss; files of earlier versions lack it."""


def write_replay_file(file: Path, batch: ClipBatch, about: BatchOrigin) -> None:
    """Write a micro-batch; its weights are in `WEIGHTS` beside it. Raises OSError."""
    tensors = {
        "clips": batch.clips.float(),
        "labels": batch.labels,
        "ids": batch.ids,
        "valid": batch.valid,
        "keys": batch.keys,
    }
    if batch.mixed is not None:
        tensors |= {"mixed_labels": batch.mixed.labels, "mixed_weights": batch.mixed.weights}
    file.parent.mkdir(parents=True, exist_ok=True)
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_tensors(file, held, {"format": FORMAT, "about": json.dumps(asdict(about))})


def replay(file: Path) -> bool:
    """Run the clips through the weights beside them, in fp32 and in the run's precision, and print the first
    value that is not finite. Returns whether there is one.

    Batch norms use these clips alone, not those of other ranks. Raises RunError for any other file, or where
    the weights are missing.
    """
    if file.is_dir():
        raise RunError(f"{file} is a folder: name one of the files in not-finite/step-.../ of a run")
    stored, about = _open(file)
    model = load_weights(file.parent / WEIGHTS, finite=False).model.train()
    tensors = _read(file, stored, model.config, len(about.paths))
    console = Console(markup=False, highlight=False, emoji=False)  # a path may contain markup
    console.print(
        f"step {about.step}, rank {about.rank}, micro-batch {about.micro_batch}, {about.precision}; "
        f"reason: {printable(about.words)}"
    )
    reproduced = False
    for precision in dict.fromkeys(["fp32", about.precision]):
        losses, found = _run_again(model, tensors, precision, about.label_smoothing)
        words = "all is finite" if found.origin is None else found.origin.description
        console.print(f"\n{precision}: {words}", style="bold")
        _print_losses(console, tensors, about.paths, losses)
        if found.origin is not None:
            reproduced = True
            _print_modules(console, found)
    if not reproduced:
        console.print(
            "\nIt is not reproduced with these clips alone: the cause may be other ranks' clips in a batch "
            "norm, or the hardware"
        )
    return reproduced


def _open(file: Path) -> tuple[StoredWeights, BatchOrigin]:
    """The tensors, not read yet, and `about`. Raises RunError."""
    try:
        stored = open_safetensors(file)
    except WeightFileError as error:
        raise RunError(f"--replay {file}: cannot be read: it {error}") from error
    if stored.metadata.get("format") != FORMAT:
        raise RunError(f"--replay {file}: not a replay file; see not-finite/ of the run directory")
    if not (file.parent / WEIGHTS).exists():
        raise RunError(f"--replay {file}: {WEIGHTS} is missing beside it")
    try:
        about = TypeAdapter(BatchOrigin).validate_python(json.loads(stored.metadata.get("about", "")))
    except (ValueError, RecursionError):
        raise RunError(f"--replay {file}: it is damaged: it lacks the step and the videos") from None
    return stored, about


def _read(file: Path, stored: StoredWeights, config: UniFormerV2Config, count: int) -> dict[str, Tensor]:
    """The tensors, checked against the model. Raises RunError."""
    size = config.resolution
    of_each_clip = _OF_EACH_CLIP
    if stored.shapes.keys() & _OF_EACH_MIXED_CLIP.keys():
        of_each_clip = of_each_clip | _OF_EACH_MIXED_CLIP
    wanted = {
        "clips": ((count, 3, config.frames, size, size), torch.float32),
        **{name: ((count,), dtype) for name, dtype in of_each_clip.items()},
    }
    for name, (shape, kind) in wanted.items():
        found = stored.shapes.get(name)
        if found is None:
            raise RunError(f"--replay {file}: it is damaged: {name} are missing")
        if tuple(found.shape) != shape or found.dtype != kind:
            raise RunError(
                f"--replay {file}: it is damaged: {name} are {list(found.shape)} of "
                f"{dtype_name(found.dtype)}; the {count} videos it names and the model of {WEIGHTS} make "
                f"them {list(shape)} of {dtype_name(kind)}"
            )
    try:
        tensors = stored.read(wanted, finite=False)
    except ModelError as error:
        raise RunError(f"--replay {file}: cannot be read: {error}") from error
    for name in tensors.keys() & {"labels", "mixed_labels"}:
        if (largest := int(tensors[name].max())) >= config.num_classes:
            raise RunError(
                f"--replay {file}: it is damaged: a label is {largest}, and the model of "
                f"{WEIGHTS} has {config.num_classes} classes"
            )
    return tensors


def _run_again(
    model: UniFormerV2, tensors: dict[str, Tensor], precision: str, label_smoothing: float
) -> tuple[list[float], NonfiniteTrace]:
    """Each clip's loss, and the first value that is not finite."""
    lowered = precision == "bf16"
    model.to(torch.bfloat16 if lowered else torch.float32)
    losses: list[float] = []
    mixed = None
    if "mixed_labels" in tensors:
        mixed = MixedLabels(tensors["mixed_labels"], tensors["mixed_weights"])

    def run() -> Tensor:
        clips = tensors["clips"].bfloat16() if lowered else tensors["clips"]
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            logits = model(clips, tensors["keys"])
        each = masked_cross_entropy(
            logits.float(), tensors["labels"], tensors["valid"], mixed, label_smoothing
        )
        losses.extend(each.tolist())
        return each.mean()

    return losses, trace_nonfinite(model, run)


def _print_losses(
    console: Console, tensors: dict[str, Tensor], paths: list[str], losses: list[float]
) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("sample", "loss", "video"):
        table.add_column(column, overflow="fold")
    for sample, loss, path in zip(tensors["ids"].tolist(), losses, paths, strict=True):
        table.add_row(str(sample), f"{loss:.4g}", printable(path))
    console.print(table)


def _print_modules(console: Console, found: NonfiniteTrace) -> None:
    """Print the modules around the first that is not finite, with their largest absolute values."""
    assert found.origin is not None
    calls = [index for index, record in enumerate(found.modules) if record.name == found.origin.module]
    end = -1 if found.origin.phase in ("loss", "backward") else 0  # clips and loss have no module
    middle = (calls or range(len(found.modules)))[end]
    table = Table(box=None, pad_edge=False)
    for column in ("module", "input", "weights", "output", "gradient", "passed on"):
        table.add_column(column, no_wrap=True)
    for record in found.modules[max(0, middle - _AROUND) : middle + _AROUND + 1]:
        values = (record.inputs, record.weights, record.output, record.gradient, record.passed_on)
        shown = ["" if value is None else f"{value:.3g}" for value in values]
        style = "bold" if record.name == found.origin.module else None
        table.add_row(record.name or "(the model)", *shown, style=style)
    console.print(table)
