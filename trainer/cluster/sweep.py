"""Variants of a training: recipes times values of fields, each a run of its own."""

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
    """One run: its recipe's file, the overrides of launch/train.py's `--set`, and what they come to.

    values: of the fields that the sweep varies, as written.
    """

    path: Path
    overrides: tuple[str, ...]
    values: tuple[tuple[str, str], ...]
    recipe: Recipe

    @property
    def label(self) -> str:
        """The variant's name within its sweep, fit for a folder: `l14-learning_rate-1e-4`."""
        words = [self.recipe.name]
        for field, value in self.values:
            words += [field.rpartition(".")[2], value]
        return re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(words)).strip("-")


def variants(recipes: Sequence[Path], overrides: Sequence[str], varied: Sequence[str]) -> list[Variant]:
    """Every recipe with every combination of the varied values.

    overrides: for all of them, `section.field=value`. varied: `section.field=value,value,...`; a value that
    holds commas is written as in YAML, such as `[0.9, 0.95]`.

    Raises RecipeError for a recipe that is wrong, with any of the values, or two variants that are the same.
    """
    choices = [_choices(text) for text in varied]
    found = []
    for path, chosen in product(recipes, product(*choices)):
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
