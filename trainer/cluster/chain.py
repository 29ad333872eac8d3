"""A chain: recipes that are trained one after another, each from the weights of the one before."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from trainer.config.load import load_recipe
from trainer.config.recipe_names import RECIPES, find_recipe
from trainer.config.section import Section
from trainer.config.section_file import find_section_file, read_section_file
from trainer.config.value_types import RunName, Text
from trainer.config.variants import Variant
from trainer.errors import RecipeError
from trainer.monitoring.run_dir import RunDir

CHAINS = RECIPES / "chains"
"""The chains that come with the project."""
_COMPARED = re.compile(
    r"seed|data\.(train|val|embedded)(\..*)?|(model|sampling|augmentation)\..*|optimisation\.(?!skipped_steps).*"
)
"""Fields that decide the results; others, such as `data.bad_share`, may change for the stages that follow."""

_VIEWS = ("evaluation.clips", "evaluation.crops")


class StageSection(Section):
    """One training of a chain."""

    recipe: Text
    """A recipe: its name, or its path relative to the chain's file."""

    set: tuple[Text, ...] = ()
    """Overrides of its fields, each `section.field=value` as for `--set`."""


class ChainFile(Section):
    """The file of a chain."""

    name: RunName
    """Name of the chain."""

    stages: Annotated[tuple[StageSection, ...], Field(min_length=2, max_length=16)]
    """The trainings, in order. Each after the first starts from the last weights of the one before."""


@dataclass(frozen=True)
class Stage:
    """A resolved stage."""

    variant: Variant
    run_dir: Path
    weights: Path | None
    """The weights of the stage before, from which it starts; None for the first."""

    @property
    def name(self) -> str:
        return self.variant.recipe.name

    @property
    def arguments(self) -> list[str]:
        """Of launch/train.py."""
        settings = [part for text in self.variant.overrides for part in ("--set", text)]
        return ["--recipe", str(self.variant.path), "--run-dir", str(self.run_dir), *settings]


def load_chain(path: Path, overrides: Sequence[str] = (), home: Path | None = None) -> list[Stage]:
    """Read a chain and the recipes of its stages.

    Args:
        path: the file, or the name of one of the project's chains.
        overrides: `section.field=value`, for all stages; those of a stage come later.
        home: folder of the run directories; by default each is where its recipe alone would be.

    Raises:
        RecipeError: a file cannot be read or a field is wrong, also of a stage's recipe.
    """
    file = find_section_file(path, CHAINS, "chain")
    stages: list[Stage] = []
    for number, section in enumerate(read_section_file(file, ChainFile, "a chain").stages, 1):
        beside = file.parent / section.recipe
        weights = stages[-1].run_dir / "weights.safetensors" if stages else None
        given = (
            *overrides,
            *section.set,
            *([f"model.weights={json.dumps(str(weights))}"] if weights else []),
        )
        try:
            recipe_path = beside if beside.is_file() else find_recipe(Path(section.recipe))
            recipe = load_recipe(recipe_path, given)
        except RecipeError as error:
            raise RecipeError(f"{file}: stage {number}: {error}") from error
        run_dir = (home or recipe.run.dir) / recipe.name
        if any(run_dir == other.run_dir for other in stages):
            raise RecipeError(
                f"{file}: stage {number}: its run directory, {run_dir}, is that of an earlier stage; add "
                "name=ANOTHER to its set"
            )
        stages.append(Stage(Variant(recipe_path, given, (), recipe), run_dir, weights))
    return stages


def is_finished(stage: Stage, *, compares_views: bool = False) -> bool:
    """Whether the stage's run has ended with its last step.

    compares_views: whether clips and crops of the evaluation count among the fields that decide the results.

    Raises RecipeError where a finished run had other values of fields that decide the results: it is neither
    repeated nor taken for this stage's.
    """
    folder = RunDir(stage.run_dir)
    last = folder.find_last_event("start", "end") if folder.events.exists() else None
    if last is None or last.get("event") != "end" or not folder.weights.is_file():
        return False
    then, now = load_recipe(folder.recipe).flattened(), stage.variant.recipe.flattened()
    names = [
        name
        for name in sorted(then.keys() | now.keys())
        if _COMPARED.fullmatch(name) or (compares_views and name in _VIEWS)
    ]
    changed = [
        f"{name}: {then.get(name)} then, {now.get(name)} now"
        for name in names
        if then.get(name) != now.get(name)
    ]
    if changed:
        raise RecipeError(
            f"{stage.run_dir} holds a finished run with other settings: {'; '.join(changed[:8])}. Choose "
            "another folder with --run-dir, or give the stage another name"
        )
    return True
