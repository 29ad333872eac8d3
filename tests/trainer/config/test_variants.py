"""Variants of a training: every combination once, each checked, each under a name of its own."""

from pathlib import Path

import pytest

from trainer.config.variants import variants
from trainer.errors import RecipeError

QUICK = Path("recipes/quickstart.yaml")
BLIND = Path("recipes/quickstart_order_blind.yaml")


def test_labels_name_what_differs() -> None:
    found = variants([QUICK, BLIND], ["seed=3"], ["optimisation.learning_rate=1e-4,2e-4"])
    assert [variant.label for variant in found] == [
        "quickstart-learning_rate-0.0001", "quickstart-learning_rate-0.0002",
        "quickstart_order_blind-learning_rate-0.0001", "quickstart_order_blind-learning_rate-0.0002",
    ]  # fmt: skip
    assert [variant.recipe.optimisation.learning_rate for variant in found] == [1e-4, 2e-4] * 2
    assert {variant.recipe.seed for variant in found} == {3}
    assert found[0].overrides == ("seed=3", "optimisation.learning_rate=0.0001")


def test_a_list_is_a_value_in_brackets() -> None:
    found = variants([QUICK], [], ["optimisation.betas=[0.9, 0.95],[0.9, 0.999]"])
    assert [variant.recipe.optimisation.betas for variant in found] == [(0.9, 0.95), (0.9, 0.999)]
    assert found[0].label == "quickstart-betas-0.9-0.95"


@pytest.mark.parametrize("text", ["optimisation.learning_rate", "optimisation.learning_rate=", "=1"])
def test_what_is_no_variation_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"--vary|--set"):
        variants([QUICK], [], [text])


def test_a_wrong_value_is_refused_before_anything_is_queued() -> None:
    with pytest.raises(RecipeError, match=r"--set optimisation\.learning_rate=-1"):
        variants([QUICK], [], ["optimisation.learning_rate=1e-3,-1"])
    with pytest.raises(RecipeError, match="did you mean"):
        variants([QUICK], [], ["optimisation.learning_rat=1e-3"])


def test_two_variants_of_one_name_are_refused() -> None:
    with pytest.raises(RecipeError, match="two variants are named quickstart-seed-1"):
        variants([QUICK], [], ["seed=1,1"])
