"""Recipes by name."""

from pathlib import Path

import pytest

from trainer.config.load import load_recipe
from trainer.config.recipe_names import RECIPES, find_recipe
from trainer.errors import RecipeError


def test_a_name_is_the_projects_recipe_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(Path("quickstart")) == RECIPES / "quickstart.yaml"
    assert load_recipe("own_videos").name == "own_videos"


def test_a_recipe_in_this_folder_comes_first_and_a_path_stays_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "quickstart.yaml").write_text("base: _scene\nname: mine\n")
    assert find_recipe(Path("quickstart")) == Path("recipes/quickstart.yaml")
    assert find_recipe(Path("quickstart.yaml")) == Path("quickstart.yaml")
    (tmp_path / "quickstart").write_text("")
    assert find_recipe(Path("quickstart")) == Path("quickstart")


def test_a_recipe_of_ones_own_inherits_by_name(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("base: quickstart\nname: own\n")
    recipe = load_recipe(own)
    assert recipe.name == "own" and recipe.optimisation.epochs == 4
    own.write_text("name: own\nbase: quikstart\n")
    with pytest.raises(RecipeError, match=r"own\.yaml:2: base: .*did you mean quickstart"):
        load_recipe(own)


def test_an_unknown_name_is_answered_with_the_nearest_or_all() -> None:
    with pytest.raises(RecipeError, match="did you mean k710_l14"):
        load_recipe("k710_l41")
    with pytest.raises(RecipeError, match=r"there are: .*own_videos"):
        load_recipe("zzz")
