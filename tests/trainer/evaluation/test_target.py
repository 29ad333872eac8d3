"""Which rows of a head are compared with a manifest's classes, and what identifies an evaluation."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.uniformerv2 import create_model
from pipelines.dataset import kinetics710
from trainer.checkpoint.weights import SavedWeights
from trainer.errors import RunError
from trainer.evaluation.target import EvaluationRequest, _manifest, _rows, _with_known_names, weights_digest


def weights(classes: int, names: tuple[str, ...] | None = None) -> SavedWeights:
    model = create_model(
        "tiny", form="scene", frames=4, num_classes=classes, resolution=32, width=32, depth=2, heads=2,
        global_heads=2, global_layers=[1],
    )  # fmt: skip
    return SavedWeights(model, names or tuple(f"class {n}" for n in range(classes)), {"frames": 4}, {})


def test_a_union_model_scores_each_kinetics_by_name() -> None:
    union = weights(710, kinetics710.class_names("k710"))
    for table, classes in (("k400", 400), ("k600", 600), ("k700", 700)):
        names = kinetics710.class_names(table)  # type: ignore[arg-type]
        rows = _rows(union, names, ordered=False)
        assert rows is not None and len(set(rows)) == classes
        own = [union.class_names[row] for row in rows]
        differing = [(a, b) for a, b in zip(own, names, strict=True) if a != b]
        assert all(kinetics710.synonyms()[b] == a for a, b in differing)
    assert _rows(union, union.class_names, ordered=False) is None


def test_the_released_union_is_known_by_order() -> None:
    union = _with_known_names(weights(710))
    names = kinetics710.class_names("k400_released")
    assert _rows(union, names, ordered=True) == tuple(range(400))
    order = kinetics710.released_rows()[600]
    # In the authors' order, as far as names are published.
    released = kinetics710.released_names()
    k600 = tuple(released[row] or f"unpublished {row}" for row in order)
    assert _rows(union, k600, ordered=True) == order


def test_another_list_is_refused_with_the_first_differences() -> None:
    with pytest.raises(RunError, match="juggling"):
        _rows(weights(3, ("a", "b", "c")), ("a", "juggling"), ordered=False)


def test_the_digest_is_of_numbers_and_names() -> None:
    torch.manual_seed(0)
    first = weights(3)
    assert weights_digest(first) == weights_digest(replace(first, step=9))
    assert weights_digest(first) != weights_digest(replace(first, class_names=("x", "y", "z")))
    before = weights_digest(first)
    with torch.no_grad():
        next(first.model.parameters()).view(-1)[0] += 1
    assert weights_digest(first) != before


def test_weights_without_a_recipe_need_a_manifest() -> None:
    with pytest.raises(RunError, match="--manifest"):
        _manifest(EvaluationRequest(Path("w.pth")), None)
