"""The guide's walk from a folder of videos to a fine-tuned CLIP, with a narrow model. A minute, so only in
`make soak`."""

import json
import sys
from pathlib import Path

import open_clip
import pytest
import torch

from tests.integration.processes import ROOT, typed

VISION = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 4, "head_width": 32}
TEXT = {"context_length": 4, "vocab_size": 8, "width": 16, "heads": 2, "layers": 1}
SIZE = "{resolution: 32, patch_size: 8, width: 64, depth: 4, heads: 2}"


@pytest.mark.soak
def test_from_a_folder_to_a_fine_tuned_clip(tmp_path: Path) -> None:
    def run(name: str, *arguments: str) -> str:
        command = [sys.executable, str(ROOT / "launch" / f"{name}.py"), *arguments]
        done = typed(*command, folder=tmp_path, variables={"COLUMNS": "200"})
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        return done.stdout

    run("prepare", "motion", "videos", "--train-clips", "64", "--val-clips", "24", "--workers", "1")
    for split in ("train", "val"):
        run("prepare", "folder", f"videos/{split}", "--out", f"data/mine/{split}.arrow", "--workers", "1")
    assert "Every row is valid" in run("prepare", "verify", "data/mine/train.arrow")
    run("prepare", "report", "data/mine/train.arrow", "--sample", "8", "--transcode", "1", "--out", "r.html")
    assert "move_left" in (tmp_path / "r.html").read_text(encoding="utf-8")

    torch.manual_seed(0)
    torch.save(open_clip.CLIP(16, VISION, TEXT, quick_gelu=True).state_dict(), tmp_path / "ViT-B-16.pt")
    run("prepare", "weights", "ViT-B-16.pt", "--out", "weights/clip_vit_b16.safetensors")

    changes = ("model.frames=4", f"model.overrides={SIZE}", "optimisation.steps=12", "tracking.enabled=false")
    train = ["--recipe", "finetune", *(part for text in changes for part in ("--set", text))]
    checked = run("train", *train, "--check")
    assert "nothing is missing" in checked
    assert "weights/clip_vit_b16.safetensors, CLIP as OpenAI and open_clip name it" in checked
    assert "initialisation: balance (1), fusion" in checked and not (tmp_path / "runs").exists()
    run("train", *train)
    run(
        "train",
        *train,
        "--set",
        "name=frozen",
        "--set",
        f"model.overrides={SIZE[:-1]}, frozen_backbone: true}}",
    )
    summary = json.loads((tmp_path / "runs" / "finetune" / "summary.json").read_text())
    assert summary["steps"] == 12 and summary["videos"] == 24

    evaluated = json.loads(run("evaluate", "runs/finetune", "--last", "--json"))
    assert evaluated["top1"] == summary["top1"]
    video = next((tmp_path / "videos" / "val" / "grow").iterdir())
    (predicted,) = run(
        "predict", "--weights", "runs/finetune", str(video), "--top", "3", "--json"
    ).splitlines()
    assert len(json.loads(predicted)["top"]) == 3
    compared = run("compare", "runs/finetune", "runs/frozen")
    assert "frozen_backbone" in compared and "same batches" in compared
