"""A folder in the layout of the Hugging Face Hub: configuration, weights, preprocessing and a model card.

The architecture is not one of the library `transformers`: `uniformerv2.load(FOLDER)` loads the folder.
"""

import dataclasses
from pathlib import Path
from typing import Any

from trainer.checkpoint.weights import save_weights
from trainer.export.export_source import ExportSource
from trainer.export.model_card import model_card
from trainer.export.numeric_check import check_agreement
from trainer.export.public_metadata import public_recipe
from trainer.inference.model_source import HUB_WEIGHTS, open_model
from trainer.system.files import write_json, write_text


def write_hub_folder(source: ExportSource, path: Path) -> float:
    """Make the folder; returns how far the logits of what is read from it are from the model's.

    Raises RunError where they are too far, or where a file cannot be written. The caller removes what was
    written then.
    """
    path.mkdir()
    weights = source.weights
    description = {
        "model": dataclasses.asdict(weights.model.config),
        "class_names": list(weights.class_names),
        "preprocessing": weights.preprocessing,
        "recipe": public_recipe(weights.recipe),
    }
    save_weights(path / HUB_WEIGHTS, weights.model.state_dict(), description)
    write_json(path / "config.json", hub_config(source))
    write_json(path / "preprocessor_config.json", hub_preprocessing(weights.preprocessing))
    write_text(path / "README.md", model_card(source))
    return check_agreement(weights.model, open_model(path).model, "folder")


def hub_config(source: ExportSource) -> dict[str, Any]:
    """`config.json`: the model's fields, and the classes under the names that the Hub shows."""
    names = source.weights.class_names
    return {
        "architectures": ["UniFormerV2"],
        "model_type": "uniformerv2",
        "library_name": "uniformerv2-trainer",
        **dataclasses.asdict(source.weights.model.config),
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }


def hub_preprocessing(preprocessing: dict[str, Any]) -> dict[str, Any]:
    """`preprocessor_config.json`, in the words of the Hub's video processors.

    The short side is resized to the model's resolution, bilinear without antialiasing; a square is cut from
    the middle; values of 0 to 255 become 0 to 1, less the mean, through the deviation, for each of R, G, B.
    `uniformerv2` has all of it as this program says it, which frames are taken among it.
    """
    side = preprocessing["resolution"]
    return {
        "video_processor_type": "UniFormerV2VideoProcessor",
        "num_frames": preprocessing["frames"],
        "frame_sampling": preprocessing["sampling"],
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 2,  # PIL's number for bilinear
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": preprocessing["mean"],
        "image_std": preprocessing["std"],
        "data_format": "channels, frames, rows, columns",
        "uniformerv2": preprocessing,
    }
