"""Recipes by name: `quickstart` is the project's `recipes/quickstart.yaml`, wherever the command is given."""

import difflib
import os
import re
from pathlib import Path

from trainer.config.yaml import format_text
from trainer.errors import RecipeError

RECIPES = Path(__file__).parents[2] / "recipes"
"""The recipes that come with the project, in a clone and in a wheel."""

_NAME = re.compile(r"[\w-]{1,80}")


def find_recipe(given: Path, beside: Path = Path("recipes")) -> Path:
    """The file of a recipe that is given as a path, or by its name without folder and ending.

    A path is returned as it is, whether or not the file exists. A name is searched in `beside`, then among
    the project's own recipes. Raises RecipeError, with the nearest name, where neither has it.
    """
    if not _NAME.fullmatch(str(given)) or os.path.lexists(given):
        return given
    for folder in (beside, RECIPES):
        if (found := folder / f"{given}.yaml").is_file():
            return found
    known = sorted({path.stem for folder in (beside, RECIPES) for path in folder.glob("[!_]*.yaml")})
    near = difflib.get_close_matches(str(given), known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
    raise RecipeError(
        f"there is no recipe named {given} in {format_text(str(beside))} or {RECIPES}; {hint} (a recipe of "
        "another folder is given as its path, ending in .yaml)"
    )


def find_base(base: str, folder: Path) -> Path:
    """The file that a recipe in `folder` names as its base: a path relative to it, or a name
    (`find_recipe`)."""
    if not _NAME.fullmatch(base) or os.path.lexists(folder / base):
        return folder / base
    return find_recipe(Path(base), folder)
