"""Renders the embedded data set if a recipe names it and its manifests are missing."""

from pathlib import Path

from pipelines.dataset.paths import check_writable
from pipelines.synthetic.motion import render
from trainer.config.schema import Recipe
from trainer.errors import RecipeError, RunError
from trainer.monitoring.progress import show_progress


def check_embedded(recipe: Recipe) -> Path | None:
    """The folder into which the data set will be rendered; None where its manifests exist.

    Raises RecipeError when the recipe's manifests have other names than the rendered ones, RunError where the
    folder cannot be written.
    """
    embedded = recipe.data.embedded
    train = recipe.data.train_manifests[0].manifest  # the schema allows one manifest with data.embedded
    if embedded is None or (train.exists() and recipe.data.val.exists()):
        return None
    root = train.parent
    if (train.name, recipe.data.val) != ("train.arrow", root / "val.arrow"):
        raise RecipeError(
            f"data.embedded renders {root}/train.arrow and {root}/val.arrow, but data.train is "
            f"{train} and data.val {recipe.data.val}: set data.train and data.val to the rendered manifests, "
            "or leave data.embedded out"
        )
    try:
        check_writable(root)
    except OSError as error:
        raise RunError(
            f"data.embedded renders into {root}, which cannot be written ({error.filename}: "
            f"{error.strerror}); name another folder in data.train and data.val"
        ) from error
    return root


def render_missing(recipe: Recipe, *, workers: int) -> None:
    """Render the data set unless both manifests exist; continues an interrupted rendering. Rank 0 calls it.

    workers: number of processes. Raises RecipeError and RunError as `check_embedded` does.
    """
    root, embedded = check_embedded(recipe), recipe.data.embedded
    if root is None or embedded is None:
        return
    with show_progress(f"rendering {root}") as progress:
        render(root, **embedded.model_dump(), workers=workers, progress=progress, note=print)
