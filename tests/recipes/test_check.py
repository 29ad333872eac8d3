"""Every recipe passes `--check` with data and weights of its kind, and its header states what it needs."""

import dataclasses
import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from models import UniFormerV2
from models.config import UniFormerV2Config
from pipelines.dataset.kinetics710 import class_names
from pipelines.dataset.manifest import ManifestRow, write_manifest
from pipelines.synthetic.video_writer import MJPEG, encode_video
from tests.recipes.estimates import DATASETS, RECIPES, estimate, experiments, gpus_of, with_line
from trainer.checkpoint.weights import FORMAT
from trainer.config.load import load_recipe
from trainer.config.schema import Recipe
from trainer.dry_run import check
from trainer.monitoring.run_dir import RunDir
from trainer.setup.preparation import model_config, preprocessing

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so none is assumed")
ROWS = 600  # more than a global batch


def classes_of(dataset: str) -> list[str]:
    if dataset in ("k400", "k600", "k700", "k710"):
        return list(class_names(dataset))
    return [f"{dataset} {number}" for number in range(DATASETS[dataset][1])]


def write_shapes(path: Path, shapes: Mapping[str, tuple[int, ...]], metadata: dict[str, str]) -> None:
    """A safetensors file of zeros that takes no room on the disk."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def clip_shapes(config: UniFormerV2Config) -> dict[str, tuple[int, ...]]:
    """The visual tower of a CLIP model by open_clip's names."""
    width, patches = config.width, (config.resolution // config.patch_size) ** 2
    norms = {f"ln_{place}.{part}": (width,) for place in ("pre", "post") for part in ("weight", "bias")}
    block = {
        "ln_1.weight": (width,), "ln_1.bias": (width,), "ln_2.weight": (width,), "ln_2.bias": (width,),
        "attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,),
        "mlp.c_fc.weight": (4 * width, width), "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (width, 4 * width), "mlp.c_proj.bias": (width,),
    }  # fmt: skip
    tower: dict[str, tuple[int, ...]] = {
        "class_embedding": (width,), "positional_embedding": (1 + patches, width),
        "conv1.weight": (width, 3, config.patch_size, config.patch_size), "proj": (width, 512), **norms,
    }  # fmt: skip
    for number in range(config.depth):
        tower |= {f"transformer.resblocks.{number}.{name}": shape for name, shape in block.items()}
    return {f"visual.{name}": shape for name, shape in tower.items()}


def write_weights(path: Path, recipe: Recipe) -> None:
    """What `model.weights` names: an image model, or what a run of another recipe writes."""
    if path.parts[0] == "weights":
        write_shapes(path, clip_shapes(model_config(recipe, 1)), {})
        return
    other = load_recipe(RECIPES / f"{path.parent.name}.yaml")
    names = classes_of(path.parent.name.split("_")[0])
    config = model_config(other, len(names))
    with torch.device("meta"):
        state = UniFormerV2(config).state_dict()
    description = {
        "model": dataclasses.asdict(config),
        "class_names": names,
        "preprocessing": preprocessing(other, config),
        "recipe": {},
    }
    metadata = {"format_version": FORMAT, **{name: json.dumps(value) for name, value in description.items()}}
    write_shapes(path, {name: tuple(tensor.shape) for name, tensor in state.items()}, metadata)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifests of all data sets, of one small video."""
    made = tmp_path_factory.mktemp("recipes")
    encode_video(made / "a.avi", np.zeros((2, 48, 64, 3), np.uint8), MJPEG, Fraction(25), keyframe_interval=1)
    row = ManifestRow("../../a.avi", 0, 0, 0, 2, 25.0, 64, 48, "mjpeg")
    for dataset in (*DATASETS, "mine"):
        (made / "data" / dataset).mkdir(parents=True)
        for split in ("train", "val"):
            path = made / "data" / dataset / f"{split}.arrow"
            write_manifest(path, [row] * ROWS, ["run", "jump"] if dataset == "mine" else classes_of(dataset))
    return made


@needs_no_gpu
@pytest.mark.parametrize("path", [*experiments(), RECIPES / "finetune.yaml"], ids=lambda path: path.stem)
def test_a_recipe_passes_its_check(
    path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "400")
    recipe = load_recipe(path, ["tracking.enabled=false"])
    weights = recipe.model.weights
    assert weights is not None
    if not weights.exists():
        write_weights(weights, recipe)
    assert check(recipe, RunDir(folder / "run"), gpus_of(path.read_text())) == 0
    shown = capsys.readouterr().out
    assert "nothing is missing" in shown and "too much for the device" not in shown
    assert f"starting weights: {weights}" in shown and "keep their initialisation: patch" not in shown
    if "Kinetics-400, " in path.read_text() and weights.parts[0] == "runs":
        assert "rows copied by class name" in shown


@needs_no_gpu
@pytest.mark.parametrize("path", experiments(), ids=lambda path: path.stem)
def test_a_header_states_memory_and_hours(path: Path) -> None:
    text = path.read_text()
    assert text == with_line(text, estimate(path).line), "run: python -m tests.recipes.estimates"
