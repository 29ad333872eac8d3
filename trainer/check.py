"""`--check`: what a run would do and need, and what of it is missing on this machine. Builds nothing."""

import math
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.table import Table

from models import UniFormerV2Config
from models.cost import (
    activation_bytes,
    multiply_accumulates,
    parameter_count,
    train_step_flops,
    trainable_parameter_count,
)
from pipelines.dataset import Dataset
from pipelines.motion import CLASS_NAMES
from trainer.display import gmacs
from trainer.engine.engine import choose_precision
from trainer.engine.layout import Layout, choose_layout
from trainer.preparation import model_config
from trainer.recipe.schema import Recipe
from trainer.schedule import Schedule

GIB = 2**30


def check(recipe: Recipe, ranks: int | None = None) -> int:
    """Print what the run would be with so many ranks (by default, one per GPU here); returns exit code 0.

    Raises RecipeError or ModelError for a recipe that could run nowhere.
    """
    ranks = ranks or max(1, torch.cuda.device_count())
    paths = [part.manifest for part in recipe.data.train_parts]
    dataset = Dataset.open(paths) if all(path.exists() for path in paths) else None
    classes = len(dataset.class_names) if dataset else len(CLASS_NAMES) if recipe.data.embedded else None
    layout = choose_layout(recipe, ranks)
    config = model_config(recipe, classes or 1, layout.recomputed_blocks)
    console = Console()
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    if classes is None and recipe.model.num_classes is None:
        console.print("figures as if for 1 class: the manifest, which names the classes, is not here")
    for name, text in _rows(recipe, config, dataset, ranks, layout):
        table.add_row(name, text)
    console.print(table)
    missing = list(_missing(recipe))
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
    yield "memory per rank", _memory(recipe, config, ranks, layout)
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


def _memory(recipe: Recipe, config: UniFormerV2Config, ranks: int, layout: Layout) -> str:
    """An estimate: states as DeepSpeed partitions them, activations from the configuration."""
    device = "cuda" if torch.cuda.is_available() or recipe.engine.precision == "bf16" else "cpu"
    precision = choose_precision(recipe.engine.precision, torch.device(device))
    stage = layout.zero_stage
    trained = trainable_parameter_count(config)
    element = 4 if precision == "fp32" else 2
    kept = 2 if precision == "bf16" else 4  # bytes of a weight, and of a gradient, outside the optimiser
    moments = trained * (12 if precision == "bf16" else 8) / (ranks if stage >= 1 else 1)
    gradients = trained * kept / (ranks if stage >= 2 else 1)
    weights = parameter_count(config) * kept / (ranks if stage == 3 else 1)
    states = moments + gradients + weights
    activations = activation_bytes(config, batch=layout.micro_batch, bytes_per_element=element)
    return (
        f"about {(states + activations) / GIB:,.1f} GiB: {states / GIB:,.1f} of weights, gradients and "
        f"optimiser (ZeRO {stage}, {precision}), {activations / GIB:,.1f} of activations"
    )


def _flop(amount: float) -> str:
    """An amount of floating-point operations in the unit that suits it."""
    exponent = min(21, max(9, 3 * int(math.log10(max(amount, 1)) // 3)))
    unit = {9: "G", 12: "T", 15: "P", 18: "E", 21: "Z"}[exponent]
    return f"{amount / 10**exponent:,.1f} {unit}FLOP"


def _missing(recipe: Recipe) -> Iterator[str]:
    train = [("data.train", part.manifest) for part in recipe.data.train_parts]
    for name, path in (*train, ("data.val", recipe.data.val)):
        if not path.exists():
            how = "rendered at the start" if recipe.data.embedded else "make it with python launch/prepare.py"
            yield f"{name}: {path} ({how})"
    weights = recipe.model.image_weights
    if weights is not None and not weights.exists():
        yield f"model.image_weights: {weights}"
    if not torch.cuda.is_available():
        for name, value in (("precision", "bf16"), ("device", "cuda")):
            if getattr(recipe.engine, name) == value:
                yield f"a GPU (for engine.{name}: {value})"
