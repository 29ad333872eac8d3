"""`weights.safetensors` with a wrong description: refused before a model is built."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from models import create_model
from trainer.checkpoint.weights import load_weights, save_weights
from trainer.errors import RunError

SIZES = {"resolution": 16, "width": 16, "depth": 2, "heads": 2, "frames": 4, "num_classes": 3}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    model = create_model("tiny", form="temporal", **SIZES)
    description = {
        "model": dataclasses.asdict(model.config),
        "class_names": ["a", "b", "c"],
        "preprocessing": {"frames": 4},
        "recipe": {"name": "x"},
    }
    save_weights(tmp_path / "w.safetensors", model.state_dict(), description)
    return tmp_path / "w.safetensors"


def changed(
    path: Path, metadata: dict[str, str | None] | None = None, **tensors: torch.Tensor | None
) -> Path:
    """The file with other metadata or tensors; None leaves one out, `__` in a name is a dot."""
    with safe_open(path, framework="pt") as file:
        texts = {**file.metadata(), **(metadata or {})}
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    state |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(
        {name: tensor for name, tensor in state.items() if tensor is not None},
        path,
        metadata={name: text for name, text in texts.items() if text is not None},
    )
    return path


def refusal(path: Path) -> str:
    with pytest.raises(RunError) as caught:
        load_weights(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 2000
    return str(caught.value)


def with_model(path: Path, **fields: Any) -> Path:
    with safe_open(path, framework="pt") as file:
        model = {**json.loads(file.metadata()["model"]), **fields}
    return changed(path, {"model": json.dumps({k: v for k, v in model.items() if v != "left out"})})


def test_written_weights_are_read(written: Path) -> None:
    weights = load_weights(written)
    assert weights.class_names == ("a", "b", "c") and weights.recipe == {"name": "x"}
    assert weights.model(torch.zeros(1, 3, 4, 16, 16)).shape == (1, 3)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"format_version": "2"}, "no model description of this program's format 1"),
        ({"format_version": None}, "no model description"),
        ({"model": None}, "its description has no model"),
        ({"model": "{"}, "its model is no JSON"),
        ({"model": "[" * 100_000}, "its model is no JSON"),
        ({"model": "9" * 5000}, "its model is no JSON"),
        ({"model": "[]"}, "its model is not a mapping"),
        ({"model": "{}"}, "the model's field resolution is missing"),
        ({"class_names": "3"}, "its class_names is not a list"),
        ({"class_names": "[1, 2, 3]"}, "its class_names are not all text"),
        ({"class_names": None}, "its description has no class_names"),
        ({"preprocessing": "null"}, "its preprocessing is not a mapping"),
        ({"recipe": "NaN"}, "its recipe is not a mapping"),
    ],
)
def test_a_wrong_description_is_refused(written: Path, metadata: dict[str, str | None], words: str) -> None:
    assert words in refusal(changed(written, metadata))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"surplus": 3}, "the model's field surplus is not known"),
        ({"width": "left out"}, "the model's field width is missing"),
        ({"width": "16"}, "width is '16'"),
        ({"width": 10**12}, "width is 1000000000000"),
        ({"depth": 10**9}, "depth is 1000000000"),
        ({"width": 16384, "depth": 256, "mlp_ratio": 64.0}, "parameters; allowed are at most"),
        ({"resolution": 4096, "patch_size": 1}, "resolution is 4096"),
        ({"global_layers": {"a": 1}}, "global_layers"),
        ({"global_layers": [0, 0.5]}, "global_layers"),
        ({"norm_eps": float("nan")}, "norm_eps is nan"),
        ({"num_classes": 10**6}, "head.weight has shape (3, 16), expected is (1000000, 16)"),
        ({"depth": 1, "global_layers": []}, "unexpected "),
        ({"activation": ["gelu"]}, "activation is ['gelu']"),
        ({"frozen_backbone": 1}, "frozen_backbone is 1"),
    ],
)
def test_a_model_that_does_not_fit_the_tensors_is_refused(
    written: Path, fields: dict[str, Any], words: str
) -> None:
    assert words in refusal(with_model(written, **fields))


def test_other_tensors_are_refused_by_name(written: Path) -> None:
    bias = torch.zeros(3)
    assert "missing head.bias" in refusal(changed(written, head__bias=None))
    assert "head.bias has shape (4,), expected is (3,)" in refusal(
        changed(written, head__bias=torch.zeros(4))
    )
    assert "head.bias holds int64" in refusal(changed(written, head__bias=bias.long()))
    bias[1] = float("nan")
    assert "head.bias: 1 of 3 values" in refusal(changed(written, head__bias=bias))
    assert load_weights(written, finite=False).model.head.bias.isnan().sum() == 1
    load_weights(changed(written, head__bias=torch.zeros(3, dtype=torch.float64)))
    assert "unexpected head.more" in refusal(changed(written, head__more=bias))


def test_files_of_another_kind_are_refused(written: Path, tmp_path: Path) -> None:
    content = written.read_bytes()
    written.write_bytes(content[:-5])
    assert "is incomplete" in refusal(written)
    written.write_bytes(b"")
    assert "it has 0 bytes" in refusal(written)
    assert "is a folder" in refusal(tmp_path)
    assert "no weight file" in refusal(tmp_path / "none.safetensors")
