"""`ablate --check`: builds the model of every cell, and lists what is missing on this machine."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from models import ModelError, UniFormerV2, UniFormerV2Config
from pipelines.synthetic.motion import CLASS_NAMES
from trainer.config.schema import Recipe
from trainer.errors import RecipeError, RunError
from trainer.paper.ablation import Ablation
from trainer.paper.description import describe
from trainer.setup.preparation import model_config
from trainer.tracking.comparison.render import Block, Cell, Column, Heading, Paragraph, Table

_REDUCED: dict[str, Any] = {
    "resolution": 32, "patch_size": 16, "width": 16, "heads": 2, "global_heads": 2, "num_classes": 5,
}  # fmt: skip
"""A tiny size of any model, with its own number of layers and all its parts."""
_FRAMES = 4


def reduced(config: UniFormerV2Config) -> UniFormerV2Config:
    """The same structure, every layer and part of it, with tiny tensors."""
    return dataclasses.replace(config, **_REDUCED, frames=_FRAMES)


def check_trains(config: UniFormerV2Config) -> None:
    """Build a reduced model, and run its forward and backward pass on random clips.

    Raises ModelError where a logit or gradient is not finite, or a trained parameter has no gradient.
    """
    model = UniFormerV2(reduced(config)).train()
    generator = torch.Generator().manual_seed(0)
    clips = torch.randn(2, 3, _FRAMES, 32, 32, generator=generator)
    loss = F.cross_entropy(model(clips, torch.tensor([1, 2])), torch.tensor([0, 1]))
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.isfinite().all()):
            raise ModelError(f"{name} has no finite gradient")
    if not loss.isfinite():
        raise ModelError("the loss is not finite")


def missing_files(recipe: Recipe) -> list[Path]:
    """Manifests and starting weights of a recipe that do not exist; rendered ones are not missing."""
    named = [] if recipe.data.embedded is not None else [path for _, path in recipe.data.manifest_fields]
    weights = [recipe.model.weights] if recipe.model.weights is not None else []
    return [path for path in (*named, *weights) if not path.exists()]


def check(ablation: Ablation) -> tuple[list[Block], list[str]]:
    """Check every cell.

    Returns the blocks of a report, a row for each cell, and the reasons why the ablation could not start
    here.
    """
    heads = ("parameters", "trained", "GMACs a view", "paper")
    columns = [Column("row", numeric=False), Column("data", numeric=False)]
    columns += [*(Column(head) for head in heads), Column("forward and backward", numeric=False)]
    rows, problems = [], []
    for cell in ablation.cells:
        recipe = cell.variant.recipe
        try:
            classes = len(CLASS_NAMES) if recipe.data.embedded is not None else 1
            check_trains(model_config(recipe, recipe.model.num_classes or classes))
            cost = describe(recipe)
        except (ModelError, RecipeError, RunError) as error:
            problems.append(f"{cell.row}, {cell.column}: {error}")
            continue
        numbers = (f"{cost.parameters:,}", f"{cost.trained:,}", f"{cost.multiply_accumulates / 1e9:,.3g}")
        texts = (cell.row, cell.column, *numbers, f"{cell.paper:.1f}", "ok")
        rows.append([Cell(text) for text in texts])
    absent = dict.fromkeys(path for cell in ablation.cells for path in missing_files(cell.variant.recipe))
    problems += [f"{path} does not exist" for path in absent]
    return [Heading(ablation.title), Table(columns, rows), *map(Paragraph, ablation.notes)], problems
