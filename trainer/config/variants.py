"""The variants of a sweep: recipes with several values of some fields."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from trainer.config.load import load_recipe
from trainer.config.schema import Recipe
from trainer.config.yaml import parse_yaml
from trainer.errors import RecipeError


@dataclass(frozen=True)
class Variant:
    """One run of a sweep, or the only run."""

    path: Path
    overrides: tuple[str, ...]
    """values of `--set` for launch/train.py"""
    values: tuple[tuple[str, str], ...]
    """the varied fields and their values, as written"""
    recipe: Recipe

    @property
    def label(self) -> str:
        """The variant's name within its sweep, fit for a folder: `l14-learning_rate-1e-4`."""
        parts = [self.recipe.name]
        for field, value in self.values:
            parts += [field.rpartition(".")[2], value]
        return re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(parts)).strip("-")


def variants(recipes: Sequence[Path], overrides: Sequence[str], varied: Sequence[str]) -> list[Variant]:
    """Every recipe with every combination of the varied values.

    Args:
        recipes: files.
        overrides: for all variants, `section.field=value`.
        varied: `section.field=value,value,...`; a value with commas is written as in YAML: `[0.9, 0.95]`.

    Raises RecipeError for a recipe that is invalid with any of the values, or two variants of one label.
    """
    found = []
    for path, chosen in product(recipes, product(*map(_choices, varied))):
        given = (*overrides, *(f"{field}={value}" for field, value in chosen))
        found.append(Variant(path, given, chosen, load_recipe(path, given)))
    labels = [variant.label for variant in found]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise RecipeError(f"two variants are named {twice[0]}: recipes and values must differ in name")
    return found


def _choices(text: str) -> list[tuple[str, str]]:
    """`field=value,value` as (field, value) pairs, each value as `--set` takes it."""
    field, equals, values = text.partition("=")
    parsed = parse_yaml(f"[{values}]", f"--vary {text}").value if equals else None
    if not parsed:
        raise RecipeError(f"--vary {text}: a variation has the form section.field=value,value")
    return [(field.strip(), value if isinstance(value, str) else json.dumps(value)) for value in parsed]


def sweep_params(chosen: Sequence[Variant]) -> dict[str, object]:
    """The parameters of a sweep's MLflow run: the number of variants, and the values of each varied field."""
    values: dict[str, dict[str, None]] = {}
    for field, value in (pair for variant in chosen for pair in variant.values):
        values.setdefault(field, {})[value] = None
    return {"sweep": len(chosen), **{field: ", ".join(each) for field, each in values.items()}}
