"""`--check`: what a run would do and need, and what of it is missing on this machine. Builds nothing."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from models import UniFormerV2Config
from models.cost import (
    multiply_accumulates,
    parameter_count,
    train_step_flops,
    trainable_parameter_count,
)
from models.image_weights import check_image_weights
from pipelines.dataset import Dataset, check_same_classes
from pipelines.manifest import Manifest
from pipelines.motion import CLASS_NAMES
from trainer.display import gmacs
from trainer.engine.engine import choose_precision
from trainer.engine.layout import Layout, choose_layout
from trainer.engine.memory import GIB, Needs, Room, free_bytes
from trainer.preparation import model_config
from trainer.recipe.schema import Recipe
from trainer.schedule import Schedule
from trainer.tracking.tracker import check_tracking

ASSUMED_GPU = 80 * GIB  # where a run on GPUs is checked on a machine without one


def check(recipe: Recipe, ranks: int | None = None) -> int:
    """Print what the run would be with so many ranks (by default, one per GPU here); returns exit code 0.

    Raises UserError or ModelError for a recipe that could run nowhere, or not in the memory there is, and
    DataError for manifests that cannot be used together.
    """
    if recipe.tracking.enabled:
        tracking, run_dir = recipe.tracking, recipe.run.dir / recipe.name
        check_tracking(run_dir, uri=tracking.uri, experiment=tracking.experiment)
    room, whose = _room(recipe, ranks)
    ranks = ranks or max(1, torch.cuda.device_count())
    paths = [part.manifest for part in recipe.data.train_parts]
    dataset = Dataset.open(paths) if all(path.exists() for path in paths) else None
    if dataset and recipe.data.val.exists():
        check_same_classes(dataset.manifests[0], Manifest.open(recipe.data.val))
    classes = len(dataset.class_names) if dataset else len(CLASS_NAMES) if recipe.data.embedded else None
    config = model_config(recipe, classes or 1)
    precision = choose_precision(recipe.engine.precision, torch.device(room.kind))
    layout = choose_layout(recipe, config, ranks, precision=precision, room=room)
    config = model_config(recipe, classes or 1, layout.recomputed_blocks)
    needs = Needs.of(recipe, config, ranks=ranks, precision=precision, kind=room.kind)
    weights = recipe.model.image_weights
    if weights is not None and weights.exists():
        check_image_weights(config, weights)
    console = Console()
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    if classes is None and recipe.model.num_classes is None:
        console.print("figures as if for 1 class: the manifest, which names the classes, is not here")
    for name, text in _rows(recipe, config, dataset, ranks, layout):
        table.add_row(name, text)
    table.add_row("memory per rank", f"{_memory(needs, layout, room)} of {whose}")
    console.print(table)
    if layout.why:
        console.print("\n[bold]chosen for this memory[/bold]")
        for text in layout.why:
            console.print(f"  - {text}", highlight=False)
    absent = [(name, path) for name, path in _manifests(recipe) if not path.exists()]
    if absent and recipe.data.embedded:
        console.print("\n[bold]rendered at the start[/bold]")
        for name, path in absent:
            console.print(f"  - {name}: {path}", highlight=False)
        absent = []
    missing = [f"{name}: {path} (make it with python launch/prepare.py)" for name, path in absent]
    missing += _missing(recipe)
    if missing:
        console.print("\n[bold]missing on this machine[/bold]")
        for text in missing:
            console.print(f"  - {text}", highlight=False)
    else:
        console.print("\nnothing is missing on this machine", highlight=False)
    return 0


def _rows(
    recipe: Recipe, config: UniFormerV2Config, dataset: Dataset | None, ranks: int, layout: Layout
) -> Iterator[tuple[str, str]]:
    parameters = parameter_count(config)
    yield "recipe", recipe.name
    yield (
        "model",
        (
            f"{recipe.model.preset}, {recipe.model.form}: {config.frames} frames of {config.resolution} px, "
            f"{config.num_classes} classes"
        ),
    )
    yield "parameters", f"{parameters:,}, of which {trainable_parameter_count(config):,} are trained"
    yield (
        "cost",
        (
            f"{gmacs(multiply_accumulates(config) / 1e9)} a view; "
            f"{_flop(train_step_flops(config))} a clip and training step"
        ),
    )
    yield (
        "batch",
        (
            f"{recipe.optimisation.global_batch} clips a step = {ranks} rank{'s' if ranks > 1 else ''} x "
            f"{layout.micro_batch} clips x {layout.accumulation} accumulated"
        ),
    )
    videos = len(dataset) if dataset else (recipe.data.embedded and recipe.data.embedded.train_clips)
    if videos or recipe.optimisation.steps:
        per_epoch = (videos or 0) * recipe.sampling.repeats / recipe.optimisation.global_batch
        schedule = Schedule.of(recipe, per_epoch)
        total = schedule.total_steps * train_step_flops(config) * recipe.optimisation.global_batch
        yield (
            "steps",
            f"{schedule.total_steps:,} ({schedule.warmup_steps:,} of warm-up), {_flop(total)} in all",
        )
    else:
        yield "steps", f"those of {recipe.optimisation.epochs:g} epochs; how many, the missing manifest tells"
    yield "evaluation", f"{recipe.evaluation.clips} clips x {recipe.evaluation.crops} crops a video"


def _room(recipe: Recipe, ranks: int | None) -> tuple[Room, str]:
    """What a rank has, and whose it is; a GPU is assumed where the run wants one that is not here."""
    engine = recipe.engine
    if engine.device != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", 0)
        return Room("cuda", free_bytes(device, 1)), f"the {torch.cuda.get_device_name(device)} here"
    wants_gpu = engine.device == "cuda" or engine.precision == "bf16" or ranks is not None
    if engine.device != "cpu" and wants_gpu:
        return Room("cuda", ASSUMED_GPU), "a GPU, assumed since there is none here"
    return Room("cpu", free_bytes(torch.device("cpu"), ranks or 1)), "this machine's memory"


def _memory(needs: Needs, layout: Layout, room: Room) -> str:
    """The estimate that `auto` goes by."""
    demand = needs.demand(
        zero_stage=layout.zero_stage,
        micro_batch=layout.micro_batch,
        recomputed_blocks=layout.recomputed_blocks,
    )
    parts = (
        (demand.states, f"of weights, gradients and optimiser (ZeRO {layout.zero_stage}, {needs.precision})"),
        (demand.working, "of activations and buffers"),
        (demand.clips, "of clips made ahead"),
        (demand.reserve, "in reserve"),
    )
    named = ", ".join(f"{amount / GIB:,.1f} {text}" for amount, text in parts)
    fits = "" if demand.total <= room.bytes else ", too much"
    return f"about {demand.total / GIB:,.1f} GiB{fits}: {named}; there are {room.bytes / GIB:,.1f}"


def _flop(amount: float) -> str:
    """An amount of floating-point operations in the unit that suits it."""
    exponent = min(21, max(9, 3 * int(math.log10(max(amount, 1)) // 3)))
    unit = {9: "G", 12: "T", 15: "P", 18: "E", 21: "Z"}[exponent]
    return f"{amount / 10**exponent:,.1f} {unit}FLOP"


def _manifests(recipe: Recipe) -> list[tuple[str, Path]]:
    """By the fields that name them."""
    return [
        *(("data.train", part.manifest) for part in recipe.data.train_parts),
        ("data.val", recipe.data.val),
    ]


def _missing(recipe: Recipe) -> Iterator[str]:
    """Beside manifests."""
    weights = recipe.model.image_weights
    if weights is not None and not weights.exists():
        yield f"model.image_weights: {weights}"
    if not torch.cuda.is_available():
        for name, value in (("precision", "bf16"), ("device", "cuda")):
            if getattr(recipe.engine, name) == value:
                yield f"a GPU (for engine.{name}: {value})"
