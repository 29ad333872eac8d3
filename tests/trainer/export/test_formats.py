"""Exported models, each loaded in a separate process without the project's code."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from models import UniFormerV2, create_model
from tests.integration.processes import ROOT
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.weights import load_weights, save_weights
from trainer.errors import RunError
from trainer.export import formats, onnx_file
from trainer.export.export_source import ExportSource, read_source
from trainer.export.formats import export_as
from trainer.export.model_card import model_card
from trainer.export.numeric_check import check_agreement, random_clips
from trainer.monitoring.run_dir import RunDir
from trainer.system.files import write_json

NAMES = ["jump", "läuft: schnell", "sit"]
SMALL: dict[str, Any] = {
    "resolution": 32,
    "width": 32,
    "depth": 2,
    "heads": 2,
    "global_heads": 2,
    "frames": 4,
}

ONNX = """
import json, sys, numpy as np, onnx, onnxruntime
properties = {entry.key: json.loads(entry.value) for entry in onnx.load(sys.argv[1]).metadata_props}
session = onnxruntime.InferenceSession(sys.argv[1])
(given,) = session.get_inputs()
assert given.name == "clips" and isinstance(given.shape[0], str) and given.shape[1:] == [3, 4, 32, 32]
found = [session.run(["logits"], {"clips": clips})[0] for clips in np.load(sys.argv[2]).values()]
np.savez(sys.argv[3], *found)
assert not {"torch", "models", "trainer"} & set(sys.modules)
print(json.dumps(properties))
"""
PROGRAM = """
import sys, numpy as np, torch
extra = {"uniformerv2.json": ""}
program = torch.export.load(sys.argv[1], extra_files=extra).module()
found = [program(torch.from_numpy(clips)).detach().numpy() for clips in np.load(sys.argv[2]).values()]
np.savez(sys.argv[3], *found)
assert not {"models", "trainer"} & set(sys.modules)
print(extra["uniformerv2.json"])
"""
HUB = """
import sys, numpy as np, torch
model = torch.hub.load({root!r}, "uniformerv2", weights=sys.argv[1], source="local")
np.savez(sys.argv[3], *[model(torch.from_numpy(c)).detach().numpy() for c in np.load(sys.argv[2]).values()])
less = dict(frames=2, num_classes=3, width=32, depth=1, heads=2)
for preset in ("tiny", "b16", "l16", "l14", "l14_336"):
    built = torch.hub.load({root!r}, f"uniformerv2_{{preset}}", source="local", **less)
    print(preset, built.config.resolution, built.config.patch_size, built.config.num_classes)
"""


def weights_file(folder: Path, **fields: Any) -> Path:
    """A model of which no parameter and no statistic is zero, so that each one counts."""
    torch.manual_seed(0)
    model = create_model("tiny", **{"form": "temporal", "num_classes": len(NAMES), **SMALL, **fields})
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor += 0.02 + 0.02 * torch.randn(tensor.shape).abs()
    path = folder / "weights.safetensors"
    preprocessing = {
        "frames": 4,
        "resolution": 32,
        "sampling": "sparse",
        "mean": [0.45] * 3,
        "std": [0.225] * 3,
    }
    recipe = {
        "name": "example",
        "model": {"preset": "tiny", "weights": "/home/jane/clip.safetensors"},
        "data": {
            "train": [{"manifest": "/home/jane/data/mix.arrow", "ratio": 0.5}],
            "val": "/home/jane/val.arrow",
        },
        "tracking": {"uri": "https://jane:secret@tracking.example"},
        "run": {"dir": "/home/jane/runs"},
    }
    description = {
        "model": dataclasses.asdict(model.config), "class_names": NAMES,
        "preprocessing": preprocessing, "recipe": recipe,
    }  # fmt: skip
    save_weights(path, model.state_dict(), description)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights_file(tmp_path_factory.mktemp("model"), fusion="parallel", global_layers=(0, 1))


def fresh(program: str, exported: Path, model: UniFormerV2, folder: Path) -> str:
    """Run a program in `folder` on two batches, check its logits, return what it printed."""
    batches = [random_clips(model.config, count) for count in (1, 5)]
    np.savez(folder / "clips.npz", *[clips.numpy() for clips in batches])
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", program, str(exported), "clips.npz", "logits.npz"]
    result = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    for clips, found in zip(batches, np.load(folder / "logits.npz").values(), strict=True):
        with torch.no_grad():
            np.testing.assert_allclose(found, model(clips).numpy(), rtol=0, atol=1e-4)
    return result.stdout


@pytest.mark.soak
def test_an_onnx_file_needs_nothing_else(file: Path, tmp_path: Path) -> None:
    export_as("onnx", read_source(file), tmp_path / "m.onnx")
    found = json.loads(fresh(ONNX, tmp_path / "m.onnx", load_weights(file).model, tmp_path))
    assert found["class_names"] == NAMES and found["preprocessing"]["std"] == [0.225] * 3
    assert not list(tmp_path.glob(".*"))


@pytest.mark.soak
def test_a_program_of_torch_export_needs_nothing_else(file: Path, tmp_path: Path) -> None:
    export_as("torch", read_source(file), tmp_path / "m.pt2")
    found = json.loads(fresh(PROGRAM, tmp_path / "m.pt2", load_weights(file).model, tmp_path))
    assert found["class_names"] == NAMES


@pytest.mark.soak
@pytest.mark.parametrize("name", ["onnx", "torch"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"form": "scene", "global_layers": (0, 1)},
        {"form": "scene", "global_layers": ()},
        {"form": "scene", "frozen_backbone": True},
        {"form": "scene", "activation": "gelu", "patch_bias": True, "ln_pre": False},
        {"fusion": "hierarchical_kv", "global_layers": (0, 1)},
        {"fusion": "hierarchical_q", "global_layers": (0, 1)},
        {"recomputed_blocks": 2, "drop_path": 0.1},
        {"backbone": "beit"},
    ],
)
def test_every_kind_of_model_can_be_exported(fields: dict[str, Any], name: str, tmp_path: Path) -> None:
    path = weights_file(tmp_path, **fields)
    export_as(name, read_source(path), tmp_path / "exported")
    fresh({"onnx": ONNX, "torch": PROGRAM}[name], tmp_path / "exported", load_weights(path).model, tmp_path)


@pytest.mark.soak
def test_torch_hub_loads_from_another_folder(file: Path, tmp_path: Path) -> None:
    said = fresh(HUB.format(root=str(ROOT)), file, load_weights(file).model, tmp_path)
    assert said.splitlines() == [
        "tiny 64 8 3",
        "b16 224 16 3",
        "l16 224 16 3",
        "l14 224 14 3",
        "l14_336 336 14 3",
    ]


def test_a_folder_for_the_hub_has_the_results_and_nothing_private(file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    folder = RunDir(run)
    gpus = ["NVIDIA H100"] * 8
    write_json(folder.environment, {"gpus": gpus, "hostname": "jane-laptop", "packages": {"torch": "2.14"}})
    write_json(folder.summary, {"top5": 0.9, "videos": 1234, "spent": "3:00:00"})
    retention = Retention(run / "checkpoints")
    for step, top1 in ((10, 0.5), (20, 0.75), (30, 0.7)):
        retention.record_accuracy(step, top1)
    settings = {"data.train (fingerprint)": "abc123"}
    source = ExportSource(
        dataclasses.replace(load_weights(file), step=30), run=run, ranks=8, settings=settings
    )
    export_as("huggingface", source, tmp_path / "hub")

    card = (tmp_path / "hub/README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["pipeline_tag"] == "video-classification" and front["license"] is None
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.7
    for text in (
        "these weights | 30 | 70.00 %", "best evaluation of the run | 20 | 75.00 %",
        "last one | 30 | 70.00 %", "8 x NVIDIA H100", "mix.arrow", "abc123", "clip.safetensors",
        "1,234 videos", "uniformerv2.load(", "Licence",
    ):  # fmt: skip
        assert text in card, text
    config = json.loads((tmp_path / "hub/config.json").read_text())
    assert config["id2label"]["1"] == NAMES[1] and config["width"] == 32
    assert json.loads((tmp_path / "hub/preprocessor_config.json").read_text())["num_frames"] == 4
    for path in (tmp_path / "hub").iterdir():
        for word in (b"jane", b"secret", b"tracking"):
            assert word not in path.read_bytes(), (path, word)
    with pytest.raises(RunError, match="hub is an existing folder"):
        export_as("huggingface", source, tmp_path / "hub")

    program = (
        "import sys, numpy as np, torch, uniformerv2\n"
        "found = uniformerv2.load(sys.argv[1])\n"
        "clips = np.load(sys.argv[2]).values()\n"
        "np.savez(sys.argv[3], *[found.model(torch.from_numpy(c)).detach().numpy() for c in clips])\n"
    )
    here = (
        f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'launch')!r}]\n"  # as where it is installed
    )
    fresh(here + program, tmp_path / "hub", source.weights.model, tmp_path)


def test_logits_that_differ_are_refused_and_nothing_is_left(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_weights(file).model
    assert check_agreement(model, model, "same") == 0
    for wrong in (lambda clips: model(clips) + 2e-4, lambda clips: model(clips) * torch.nan):
        with pytest.raises(RunError, match="the other differs from the model"):
            check_agreement(model, wrong, "other")

    def write(source: ExportSource, path: Path) -> float:
        path.write_text("half")
        raise RunError("too far")

    monkeypatch.setitem(formats.FORMATS, "torch", formats.ExportFormat(write, "x"))
    (tmp_path / "m.pt2").write_text("before")
    with pytest.raises(RunError, match="too far"):
        export_as("torch", read_source(file), tmp_path / "m.pt2")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_two_exports_to_one_file_do_not_share_a_temporary_folder(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, contents = tmp_path / "m.pt2", ["second", "first"]

    def write(source: ExportSource, path: Path) -> float:
        content = contents.pop()
        path.write_text(content)
        if contents:  # the second export starts and ends while the first is writing
            export_as("torch", source, out)
            assert path.read_text() == content
        return 0.0

    monkeypatch.setitem(formats.FORMATS, "torch", formats.ExportFormat(write, "x"))
    export_as("torch", read_source(file), out)
    assert list(tmp_path.iterdir()) == [out] and out.read_text() == "first"


def test_markup_in_class_names_is_escaped_in_the_card(file: Path) -> None:
    names = ("<b>|jump|", "two\nlines", "[a](b)")
    card = model_card(ExportSource(dataclasses.replace(load_weights(file), class_names=names)))
    (line,) = [line for line in card.splitlines() if line.startswith("Classes: ")]
    assert line == r"Classes: \<b\>\|jump\|, two\nlines, \[a\](b)."


def test_the_card_has_the_batch_that_the_learning_rate_belongs_to(file: Path) -> None:
    optimisation: dict[str, Any] = {"learning_rate": 1e-4, "global_batch": 64}
    for reference, text in (
        (None, "| 0.0001 |"),
        (256, "| 0.0001 for 256 clips, scaled to the global batch |"),
    ):
        recipe = {"optimisation": {**optimisation, "reference_batch": reference}}
        card = model_card(ExportSource(dataclasses.replace(load_weights(file), recipe=recipe)))
        assert f"| learning rate {text}" in card


def test_mistakes_are_reported_before_the_model_is_read(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RunError, match="nowhere"):
        export_as("torch", read_source(file), tmp_path / "nowhere" / "m.pt2")
    with pytest.raises(RunError, match=r"m\\xe9.*UTF-8"):
        export_as("torch", read_source(file), tmp_path / "m\udce9")
    (tmp_path / "there").write_text("a file")
    with pytest.raises(RunError, match="there is a file"):
        export_as("huggingface", read_source(file), tmp_path / "there")
    with pytest.raises(RunError, match="--best and --last"):
        read_source(file, best=True)
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"uniformerv2-trainer\[export\]"):
        export_as("onnx", read_source(file), tmp_path / "m.onnx")
