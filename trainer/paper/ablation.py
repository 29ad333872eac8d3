"""An ablation: a grid of trainings over one or more recipes, with the numbers that the paper has for it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from trainer.cluster.chain import Stage
from trainer.config.load import load_recipe
from trainer.config.recipe_names import RECIPES, find_recipe
from trainer.config.section import Section
from trainer.config.section_file import find_section_file, read_section_file
from trainer.config.value_types import RunName, Text
from trainer.config.variants import Variant
from trainer.errors import RecipeError

ABLATIONS = RECIPES / "ablations"
"""The ablations that come with the project."""
MAX_SEEDS = 100

Overrides = tuple[Text, ...]


class ColumnSection(Section):
    """A data set of the table."""

    name: RunName
    """Its name in the table."""

    recipe: Text
    """The recipe that the rows change: its name, or its path relative to the file."""

    set: Overrides = ()
    """Overrides for all rows, each `section.field=value`."""

    paper: Text | None = None
    """The paper's column that it is compared with, where that has another name."""


class RowSection(Section):
    """A design of the table."""

    name: Text
    """Its name in the table."""

    set: Overrides = ()
    """Overrides in all columns, each `section.field=value`; they come after the column's."""

    only: dict[str, Overrides] = {}  # noqa: RUF012 - pydantic copies it
    """More overrides by the name of a column; of the paper's column where that has another name."""

    paper: dict[str, Annotated[float, Field(ge=0, le=100)]] = {}  # noqa: RUF012
    """The paper's top-1 in percent, by column. A row without a number for a column has no training there."""

    note: Text | None = None
    """A sentence below the table."""


class AblationFile(Section):
    """The file of an ablation."""

    name: RunName
    """Name of the ablation, and of the folder of its runs."""

    title: Text
    """The heading of its table."""

    rows_of: Text | None = None
    """An ablation whose rows are these, relative to the file; then `rows` is empty."""

    columns: Annotated[tuple[ColumnSection, ...], Field(min_length=1, max_length=8)]
    """The data sets."""

    rows: Annotated[tuple[RowSection, ...], Field(max_length=64)] = ()
    """The designs, in the paper's order."""


@dataclass(frozen=True)
class Cell:
    """One training of the grid, except for its seed."""

    row: str
    column: str
    paper: float
    """The paper's top-1 in percent."""
    path: Path
    """The column's recipe."""
    overrides: tuple[str, ...]
    variant: Variant
    """With the recipe's own seed."""
    label: str
    """Name of its runs, without the seed."""

    def run(self, seed: int, home: Path) -> Stage:
        """The training with the recipe's seed plus `seed`, in its directory below `home`."""
        name = f"{self.label}-seed{seed}"
        given = (*self.overrides, f"seed={self.variant.recipe.seed + seed}", f"name={name}")
        return Stage(Variant(self.path, given, (), load_recipe(self.path, given)), home / name, None)


@dataclass(frozen=True)
class Ablation:
    """A resolved ablation."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    cells: tuple[Cell, ...]
    """By row, then by column. Cells of equal recipes have the same label: one training serves both."""
    notes: tuple[str, ...]

    def runs(self, seeds: int, home: Path) -> list[tuple[Cell, int, Stage]]:
        """The distinct trainings: all cells of one seed before those of the next.

        Raises RecipeError for a number of seeds that is not from 1 to 100.
        """
        if not 1 <= seeds <= MAX_SEEDS:
            raise RecipeError(f"--seeds {seeds}: from 1 to {MAX_SEEDS}")
        distinct = {cell.label: cell for cell in self.cells}.values()
        return [(cell, seed, cell.run(seed, home)) for seed in range(seeds) for cell in distinct]


def load_ablation(path: Path, overrides: Sequence[str] = (), only: str | None = None) -> Ablation:
    """Read an ablation and the recipes of its cells.

    Args:
        path: the file, or the name of one of the project's ablations.
        overrides: `section.field=value` for all cells; they come last.
        only: a regular expression; rows whose name it does not match are left out.

    Raises:
        RecipeError: a file cannot be read, or a field is wrong, also of a cell's recipe.
    """
    file = find_section_file(path, ABLATIONS, "ablation")
    described = read_section_file(file, AblationFile, "an ablation")
    rows = described.rows
    if described.rows_of is not None:
        if rows:
            raise RecipeError(f"{file}: give `rows`, or `rows_of`")
        rows = read_section_file(file.parent / described.rows_of, AblationFile, "an ablation").rows
    _check_columns(file, described, rows)
    rows = tuple(row for row in rows if only is None or _matches(only, row.name))
    if not rows:
        raise RecipeError(f"{file}: no row{f' matches --rows {only}' if only else ''}")
    cells: list[Cell] = []
    known: dict[str, str] = {}  # label by the resolved recipe
    for row in rows:
        for column in described.columns:
            if column.name in row.paper or column.paper in row.paper:
                cells.append(_cell(file, described, row, column, overrides, known))
    if not cells:
        raise RecipeError(f"{file}: no row{f' that matches --rows {only}' if only else ''} has a number")
    names = [column.name for column in described.columns]
    notes = [f"{row.name}: {row.note}" for row in rows if row.note]
    return Ablation(
        described.name,
        described.title,
        tuple(names),
        tuple(row.name for row in rows),
        tuple(cells),
        tuple(notes),
    )


def _cell(
    file: Path,
    described: AblationFile,
    row: RowSection,
    column: ColumnSection,
    overrides: Sequence[str],
    known: dict[str, str],
) -> Cell:
    paper = column.name if column.name in row.paper else column.paper or ""
    given = (*column.set, *row.set, *row.only.get(paper, ()), *overrides)
    try:
        beside = file.parent / column.recipe
        path = beside if beside.is_file() else find_recipe(Path(column.recipe))
        recipe = load_recipe(path, given)
    except RecipeError as error:
        raise RecipeError(f"{file}: row {row.name}, column {column.name}: {error}") from error
    label = _folder_name(described.name, row.name, column.name if len(described.columns) > 1 else "")
    label = known.setdefault(recipe.to_yaml(), label)
    variant = Variant(path, given, (), recipe)
    return Cell(row.name, column.name, row.paper[paper], path, given, variant, label)


def _folder_name(*parts: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(filter(None, parts))).strip("-").lower()


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error as error:
        raise RecipeError(f"--rows {pattern}: {error}") from None


def _check_columns(file: Path, described: AblationFile, rows: Sequence[RowSection]) -> None:
    """Raises RecipeError for a column without numbers, a row with a number or override of no column, and two
    rows of one name."""
    columns = {name for column in described.columns for name in (column.name, column.paper)}
    for column in described.columns if rows else ():
        if not any(column.name in row.paper or column.paper in row.paper for row in rows):
            raise RecipeError(f"{file}: column {column.name}: no row has a number for it")
    for row in rows:
        # Of another ablation, some columns may be left out.
        unknown = sorted(row.paper.keys() - columns) if described.rows_of is None else []
        if unknown:
            raise RecipeError(f"{file}: row {row.name}: paper.{unknown[0]}: there is no such column")
        for name in row.only.keys() - row.paper.keys():
            raise RecipeError(f"{file}: row {row.name}: only.{name}: the row has no number for it")
    names = [_folder_name(row.name) for row in rows]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RecipeError(f"{file}: two rows are named {twice[0]}")
