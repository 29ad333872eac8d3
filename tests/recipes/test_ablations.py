"""Every row of the paper's tables 8, 9, 12 to 15, made from a recipe by changing fields, trains."""

from functools import cache
from pathlib import Path

import pytest

from trainer.config.load import load_recipe
from trainer.paper.ablation import ABLATIONS, Ablation, Cell, load_ablation
from trainer.paper.check import check_trains
from trainer.setup.preparation import model_config

NAMES = sorted(path.stem for path in ABLATIONS.glob("[!_]*.yaml"))
# Top-1 as printed in the paper, by row.
PAPER = {
    "table8": [
        (78.7, 59.5), (81.6, 67.5), (82.7, 66.5), (78.7, 65.8), (84.4, 69.5), (78.8, 65.1), (82.2, 67.7)
    ],
    "table9a": [(83.1, 45.1), (84.4, 63.3), (83.6, 67.7), (84.4, 68.7), (84.4, 69.5)],
    "table9b": [
        (65.2,), (67.5,), (68.0,), (69.1,), (69.1,), (69.5,),
        (68.9,), (69.1,), (69.5,), (69.5,), (67.9,), (67.6,),
    ],
    "table9c": [(84.2, 68.1), (84.4, 68.5), (84.4, 69.5), (84.4, 69.4)],
    "table9d": [(69.5,), (69.1,), (68.9,), (69.5,)],
    "table9e": [(84.4, 85.0, 75.8), (85.6, 86.3, 76.3)],
    "table12": [(81.8,), (84.4,)],
    "table13": [(56.8, 69.5), (55.8, 68.4)],
    "table14": [(69.5,), (69.1,), (68.6,)],
    "table15": [(45.1,), (63.4,), (65.8,), (65.6,), (65.7,), (61.5,), (67.7,)],
}  # fmt: skip


@cache
def ablation(name: str) -> Ablation:
    return load_ablation(Path(name))


CELLS = [cell for name in NAMES for cell in {each.label: each for each in ablation(name).cells}.values()]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.label)
def test_a_row_is_built_and_trains(cell: Cell) -> None:
    recipe = cell.variant.recipe
    check_trains(model_config(recipe, recipe.model.num_classes or 8))


@pytest.mark.parametrize("name", PAPER)
def test_the_numbers_are_those_of_the_paper(name: str) -> None:
    found = ablation(name)
    values = [tuple(c.paper for c in found.cells if c.row == row) for row in found.rows]
    assert values == PAPER[name]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.label)
def test_a_row_differs_from_its_recipe_in_what_it_sets(cell: Cell) -> None:
    base = load_recipe(cell.path).flattened()
    set_here = {text.partition("=")[0] for text in cell.overrides}
    now = cell.variant.recipe.flattened()
    changed = {name for name in base.keys() | now.keys() if base.get(name) != now.get(name)}
    assert changed <= set_here


def test_fine_tuning_from_k710_is_the_released_recipe() -> None:
    for cell in ablation("table9e").cells[3:]:
        released = load_recipe(Path(f"{cell.column.lower()}_b16")).flattened()
        now = cell.variant.recipe.flattened()
        assert {name for name in now if now[name] != released[name]} == {"name"}


def test_rows_of_equal_recipes_are_one_training() -> None:
    found = ablation("table9b")
    assert len(found.cells) == 12 and len(found.runs(3, Path("runs"))) == 33


def test_the_default_of_a_table_is_the_recipe_of_the_paper() -> None:
    """The best row of each table is the model of the released experiment."""
    for name, row, recipe in (
        ("table9b", "Local MHRA x 2", "ssv2_b16_16f"),
        ("table9c", "layers 5-12", "ssv2_b16_16f"),
        ("table9d", "Sequential", "ssv2_b16_16f"),
        ("table14", "1 query", "ssv2_b16_16f"),
    ):
        (cell,) = [c for c in ablation(name).cells if c.row == row and c.column == "SSV2"]
        released = model_config(load_recipe(Path(recipe)), 174)
        assert model_config(cell.variant.recipe, 174) == released
