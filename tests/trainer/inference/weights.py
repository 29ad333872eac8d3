"""Files of weights for tests: a tiny model that was not trained."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from models import create_model
from trainer.checkpoint.weights import save_weights
from trainer.inference.preprocessing import Preprocessing

CLASSES = ("jump", "бег", "跳ぶ", "a\x1b[31mred")
SIZES = {"resolution": 16, "width": 16, "depth": 2, "heads": 2, "frames": 4, "num_classes": 4}


def write_weights(path: Path, preprocessing: dict[str, Any] | None = None) -> Path:
    torch.manual_seed(0)
    model = create_model("tiny", form="temporal", **SIZES)
    with torch.no_grad():  # scores that differ between videos
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    if preprocessing is None:
        preprocessing = Preprocessing(4, 16, (0.45,) * 3, (0.225,) * 3, 2, 3).as_metadata()
    description = {
        "model": dataclasses.asdict(model.config),
        "class_names": list(CLASSES),
        "preprocessing": preprocessing,
        "recipe": {},
    }
    save_weights(path, model.state_dict(), description)
    return path
